"""The training loop: next batch, step, commit, maybe log, maybe save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from streamswav.crops import Augment
from streamswav.errors import BudgetSpentError, DrainedError, StorageError, UnavailableError
from streamswav.loader import Batch
from streamswav.training.feed import Feed
from streamswav.training.learner import Learner
from streamswav.training.monitor import Monitor
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
        step: int,
        images_limit: int | None,
        device: torch.device,
    ) -> None:
        self._learner, self._feed, self._augment, self._pace = learner, feed, augment, pace
        self._saver, self._monitor, self._images_limit = saver, monitor, images_limit
        self._device = device
        self.step = step

    def train(self) -> None:
        """Train to the end.

        Raises:
            DrainedError: stopped by a signal; everything is saved.
            StreamswavError: what made it impossible to go on; the last checkpoint stands.
        """
        feed, monitor = self._feed, self._monitor
        for batch in self._batches():
            stride = self._pace.stride(feed.trained, feed.committed_bytes)
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
            self.step += 1
            monitor.stepped(batch, result, step=self.step, images=feed.trained, rate=stride.rate)
            if feed.log_agreed or feed.save_agreed:  # a checkpoint must not hold what is not finite
                feed.synchronise()
                self._log(stride.rate)
            if feed.save_agreed:
                self._save()
        if feed.drained:
            monitor.draining()
        self._log(self._rate)
        self._save()
        if feed.drained:
            raise DrainedError(f"drained after a signal at step {self.step}: the same command continues")

    def idle(self, idle: bool) -> None:
        """Save before a wait for new shards that may be long; every rank is called after the same step."""
        self._monitor.waiting(idle)
        if idle and self.step:
            self._log(self._rate)
            self._save()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        limit = self._images_limit
        return self._feed.position.finished or (limit is not None and self._feed.trained >= limit)

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
            self._log(self._rate)
            with contextlib.suppress(StorageError):
                self._save(self._saver.hurried(RESCUE_SECONDS))

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
        return self._pace.stride(self._feed.trained, self._feed.committed_bytes).rate

    def _log(self, rate: float) -> None:
        images = self._feed.trained
        self._monitor.log(
            step=self.step,
            images=images,
            fraction=self._pace.fraction(images, self._feed.committed_bytes),
            rate=rate,
            quarantined=self._feed.skipped,
        )

    def _save(self, saver: Saver | None = None) -> None:
        feed, monitor = self._feed, self._monitor
        with monitor.saving():
            saver = saver or self._saver
            saved = saver.save(self._learner, feed, step=self.step, loss_first=monitor.loss_first)
        if saved:
            monitor.saved(saved)
