"""The training loop: next batch, step, commit, maybe log, maybe save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from streamswav.errors import (
    BudgetSpentError,
    DrainedError,
    HealthError,
    NonFiniteError,
    StorageError,
    UnavailableError,
)
from streamswav.loader import Batch
from streamswav.training.evaluating import Evaluator
from streamswav.training.feed import Feed
from streamswav.training.monitor import Monitor
from streamswav.training.open_steps import SUSPICIOUS, OpenSteps, refuse_unbounded
from streamswav.training.pace import Pace
from streamswav.training.saver import Saver
from streamswav.training.task import Task

RESCUE_SECONDS = 20.0


class Trainer:
    """Trains a task on a feed until the feed ends, the images are done, or a drain is asked for.

    Attributes:
        step: optimizer steps done, over all starts of the run.
    """

    def __init__(
        self,
        *,
        task: Task,
        feed: Feed,
        pace: Pace,
        saver: Saver,
        monitor: Monitor,
        open_steps: OpenSteps,
        step: int,
        images_limit: int | None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self._task, self._feed, self._pace = task, feed, pace
        self._saver, self._monitor, self._images_limit = saver, monitor, images_limit
        self._open_steps, self._evaluator = open_steps, evaluator
        self._evaluated = -1
        self.step = step

    def train(self) -> None:
        """Train to the end.

        Raises:
            DrainedError: stopped by a signal; everything is saved.
            StreamswavError: what made it impossible to go on; the last checkpoint stands.
        """
        feed, monitor = self._feed, self._monitor
        # One that was due after the last step of a run that was stopped may not have been.
        if self.step == 0 or self._evaluation_due:
            self._evaluate()
        for batch in self._batches():
            stride = self._pace.stride(feed.seen, feed.seen_bytes)
            with monitor.clock.within("h2d"):
                tensors = self._task.to_device(batch)
            with monitor.clock.within("forward_backward"):
                result = self._task.step(tensors, stride)
            feed.commit(batch)
            self._open_steps.add(batch, result)
            self.step += 1
            monitor.stepped(
                result, step=self.step, images=feed.seen, rate=stride.rate, watch=self._task.watch
            )
            if feed.log_agreed or feed.save_agreed or result.look:
                self._look(stride.rate)
            if self._evaluation_due:
                self._evaluate()
            if feed.save_agreed:
                self._save()
        if feed.drained:
            monitor.draining()
        self._look(self._rate, last=not feed.drained)
        if not feed.drained:
            self._evaluate()
        saved = self._save(wait=True, last=True)
        if feed.drained:
            since = "" if saved else "; the last steps were not finite: it begins again before them"
            raise DrainedError(
                f"drained after a signal at step {self.step}: the same command continues{since}"
            )

    @property
    def _evaluation_due(self) -> bool:
        """Whether the last step is followed by an evaluation."""
        feed = self._feed
        return self._evaluator is not None and self._evaluator.due(feed.seen, feed.position.grid.batch)

    def _evaluate(self) -> None:
        """Measure what is trained, once a step at most; every rank must call this after the same step."""
        if self._evaluator is None or self._evaluated == self.step:
            return
        step, images = self.step, self._feed.seen
        self._evaluated = step
        with self._monitor.evaluating():
            scores = self._evaluator.measure(self._task.subject, step=step, images=images)
        self._monitor.measured(scores, step=step, images=images)

    def idle(self, idle: bool) -> None:
        """Save before a wait for new shards that may be long; every rank is called after the same step."""
        self._monitor.waiting(idle)
        if idle and self.step:
            self._look(self._rate)
            self._save(last=True)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        limit = self._images_limit
        return self._feed.position.finished or (limit is not None and self._feed.seen >= limit)

    def _batches(self) -> Iterator[Batch]:
        batches = iter(self._feed)
        while not self.done:
            try:
                with self._monitor.clock.within("data_wait"):
                    batch = next(batches, None)
            except (UnavailableError, BudgetSpentError):
                self._rescue()
                raise
            if batch is None:
                return
            yield batch

    def _rescue(self) -> None:
        """Save before the stream's error ends the run: all ranks have it after the same step.

        The checkpoints may lie where the shards do, so storage is given little time.
        """
        if self.step:
            self._look(self._rate)
            with contextlib.suppress(StorageError):
                self._save(wait=True, seconds=RESCUE_SECONDS, last=True)

    @property
    def _rate(self) -> float:
        """Learning rate of the step that would come next."""
        return self._pace.stride(self._feed.seen, self._feed.seen_bytes).rate

    def _look(self, rate: float, *, last: bool = False) -> None:
        """Read what the steps since the last look came to; every rank must call this after the same step.

        Raises:
            NonFiniteError: too many of them were skipped; their samples are listed.
            HealthError: a bad verdict has held for as long as it may; everything is saved.
        """
        feed, steps = self._feed, self._open_steps
        with self._monitor.clock.waiting():
            settled = steps.settle()
        self._monitor.settled(settled, in_a_row=steps.in_a_row)
        feed.synchronise()
        self._monitor.log(
            step=self.step,
            images=feed.seen,
            fraction=self._pace.fraction(feed.seen, feed.seen_bytes),
            rate=rate,
            quarantined=feed.skipped,
            read=self._task.readings,
            ahead=feed.look_ahead,
        )
        try:
            steps.check(self.step, last=last)
        except NonFiniteError:
            self._saver.list_passed_over(feed, step=self.step)
            raise
        verdict = self._monitor.hopeless
        if verdict and not (last or self.done):
            self._save(wait=True, last=True)
            raise HealthError(verdict.why_to_stop)

    def _save(self, *, wait: bool = False, seconds: float | None = None, last: bool = False) -> bool:
        """Save, unless the last steps were skipped: what they met may be what the weights have become.

        Args:
            wait: until it is committed; otherwise it is written while training goes on.
            seconds: how long storage is given, at most.
            last: no better moment comes soon, so a skipped step or two are no reason not to.

        Returns:
            Whether everything up to this step is saved.

        Raises:
            NonFiniteError: the weights are out of all bounds.
        """
        feed, monitor = self._feed, self._monitor
        if self._open_steps.in_a_row >= (SUSPICIOUS if last else 1):
            monitor.put_off(self.step)
            return False
        learner = self._task.learner
        refuse_unbounded(learner, self.step)
        loss_first = monitor.loss_first
        with monitor.saving():
            self._saver.save(learner, feed, step=self.step, loss_first=loss_first, wait=wait, seconds=seconds)
        return True
