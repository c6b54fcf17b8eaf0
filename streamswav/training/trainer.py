"""The training loop: next batch, step, commit, maybe log, maybe save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from streamswav.crops import Augment
from streamswav.errors import (
    BudgetSpentError,
    DrainedError,
    NonFiniteError,
    StorageError,
    UnavailableError,
)
from streamswav.loader import Batch
from streamswav.training.feed import Feed
from streamswav.training.learner import Learner
from streamswav.training.monitor import Monitor
from streamswav.training.open_steps import SUSPICIOUS, OpenSteps, refuse_unbounded
from streamswav.training.pace import Pace
from streamswav.training.saver import Saver

RESCUE_SECONDS = 20.0


class Trainer:
    """Trains a learner on a feed until the feed ends, the images are done, or a drain is asked for.

    Attributes:
        step: optimizer steps done, over all starts of the run.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        feed: Feed,
        augment: Augment,
        pace: Pace,
        saver: Saver,
        monitor: Monitor,
        open_steps: OpenSteps,
        step: int,
        images_limit: int | None,
        device: torch.device,
    ) -> None:
        self._learner, self._feed, self._augment, self._pace = learner, feed, augment, pace
        self._saver, self._monitor, self._images_limit = saver, monitor, images_limit
        self._device, self._open_steps = device, open_steps
        self.step = step

    def train(self) -> None:
        """Train to the end.

        Raises:
            DrainedError: stopped by a signal; everything is saved.
            StreamswavError: what made it impossible to go on; the last checkpoint stands.
        """
        feed, monitor = self._feed, self._monitor
        for batch in self._batches():
            stride = self._pace.stride(feed.seen, feed.seen_bytes)
            with monitor.phase("h2d"):
                crops = self._augmented(batch)
            with monitor.phase("forward_backward"):
                result = self._learner.step(
                    crops,
                    rate=stride.rate,
                    freeze_prototypes=stride.freeze_prototypes,
                    use_queue=stride.use_queue,
                )
            feed.commit(batch)
            self._open_steps.add(batch, result)
            self.step += 1
            monitor.stepped(batch, result, step=self.step, images=feed.seen, rate=stride.rate)
            # Whether the queue is full must not depend on when somebody looks.
            if feed.log_agreed or feed.save_agreed or result.filled:
                self._look(stride.rate)
            if feed.save_agreed:
                self._save()
        if feed.drained:
            monitor.draining()
        self._look(self._rate, last=not feed.drained)
        saved = self._save(wait=True, last=True)
        if feed.drained:
            since = "" if saved else "; the last steps were not finite: it begins again before them"
            raise DrainedError(
                f"drained after a signal at step {self.step}: the same command continues{since}"
            )

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
                with self._monitor.phase("data_wait"):
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

    def _augmented(self, batch: Batch) -> list[torch.Tensor]:
        """Move the crops to the device and augment them there, resolution by resolution."""
        counts = [len(pixels) for pixels in batch.pixels]
        by_resolution = zip(batch.pixels, torch.split(batch.parameters, counts), strict=True)
        return [
            self._augment(pixels.to(self._device, non_blocking=True), parameters)
            for pixels, parameters in by_resolution
        ]

    @property
    def _rate(self) -> float:
        """Learning rate of the step that would come next."""
        return self._pace.stride(self._feed.seen, self._feed.seen_bytes).rate

    def _look(self, rate: float, *, last: bool = False) -> None:
        """Read what the steps since the last look came to; every rank must call this after the same step.

        Raises:
            NonFiniteError: too many of them were skipped; their samples are listed.
        """
        feed, steps = self._feed, self._open_steps
        self._monitor.settled(steps.settle(), in_a_row=steps.in_a_row)
        feed.synchronise()
        self._monitor.log(
            step=self.step,
            images=feed.seen,
            fraction=self._pace.fraction(feed.seen, feed.seen_bytes),
            rate=rate,
            quarantined=feed.skipped,
        )
        try:
            steps.check(self.step, last=last)
        except NonFiniteError:
            self._saver.list_passed_over(feed, step=self.step)
            raise

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
        refuse_unbounded(self._learner, self.step)
        loss_first = monitor.loss_first
        with monitor.saving():
            self._saver.save(
                self._learner, feed, step=self.step, loss_first=loss_first, wait=wait, seconds=seconds
            )
        return True
