"""Where the time of a run goes, what it learns, and when it says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from streamswav.loader import Batch
from streamswav.stream.cached import CACHE_OUTCOMES
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import LOST_REASONS, PassedOver
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Progress, Reporter
from streamswav.training.checkpoint import Checkpoint
from streamswav.training.distributed import Ranks
from streamswav.training.learner import StepResult
from streamswav.training.open_steps import Settled
from streamswav.training.watchdog import Watchdog


class Monitor:
    """Feeds metrics and the log. Nothing is read from the device between two logs.

    Attributes:
        loss_first: loss of the run's first step.
        loss_last: mean loss of the steps between the last two logs.
        images_per_second: over this process' whole training.
    """

    def __init__(
        self,
        metrics: Metrics,
        reporter: Reporter,
        ranks: Ranks,
        *,
        log_seconds: float,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._watchdog = watchdog or Watchdog()
        self.metrics, self._reporter, self._ranks = metrics, reporter, ranks
        self._log_seconds = log_seconds
        self.loss_first: float | None = None
        self.loss_last = math.nan
        self._began = self._logged = self._stepped = time.perf_counter()
        self._phases: dict[str, float] = {}
        self._accounted = 0.0
        self._state = "init"
        self._images_begun = self._images_logged = 0
        self._losses = torch.zeros((), device=ranks.device)
        self._counted = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._steps = 0
        self._trained = 0

    def begin(self, *, images: int, loss_first: float | None) -> None:
        """Start the clocks; `images` were trained before this process."""
        self._began = self._logged = self._stepped = time.perf_counter()
        self._accounted = 0.0
        self._images_begun = self._images_logged = self._trained = images
        self.loss_first = loss_first
        self._enter("training")

    def draining(self) -> None:
        """Tell that the run stops after a signal."""
        self._enter("draining")

    def log_due(self) -> bool:
        """Tell whether it is time for a log line; the first step gets one at once."""
        return self.loss_first is None or time.perf_counter() - self._logged >= self._log_seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account the time within to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._account(name, time.perf_counter() - began)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Account the time within to the checkpoint."""
        with self._within("checkpoint", "checkpoint"), self._watchdog.within("checkpoint"):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Account the time within to the evaluation."""
        with self._within("evaluating", "evaluation"), self._watchdog.within("evaluation"):
            yield

    def measured(self, scores: Mapping[str, float], *, step: int, images: int) -> None:
        """Tell what was measured of the trunk: shares from 0 to 1 by the probe's name."""
        for name, share in scores.items():
            self.metrics.probe_accuracy.labels(name).set(share)
        if scores:
            shown = ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
            self._reporter.event("probe", shown, step=step, images=images, **scores)

    def stepped(self, batch: Batch, result: StepResult, *, step: int, images: int, rate: float) -> None:
        """Record one step."""
        self._watchdog.enter("step")
        if self.loss_first is None:  # the first step is logged at once, so it may be read
            first = self._mean_over_ranks(float(result.loss))
            self.loss_first = first if math.isfinite(first) else None
        # A loss that is not finite was skipped with its step.
        self._losses += torch.where(result.skipped, 0.0, result.loss)
        self._counted += result.skipped.logical_not()
        self._steps += 1
        metrics, now = self.metrics, time.perf_counter()
        metrics.step_duration.observe(now - self._stepped)
        self._account("other", max(0.0, now - self._stepped - self._accounted))
        self._accounted = 0.0
        metrics.step.set(step)
        metrics.last_step_timestamp.set(time.time())
        metrics.learning_rate.set(rate)
        for stage, seconds in batch.seconds.items():
            metrics.stage_seconds.labels(stage).inc(seconds)
        for outcome, received in batch.traffic:
            if outcome in CACHE_OUTCOMES:
                metrics.cache_reads.labels(outcome.removeprefix("cache_")).inc()
                continue
            metrics.s3_requests.labels(outcome).inc()
            metrics.s3_received_bytes.inc(received)
        self._stepped, self._trained = now, images

    def settled(self, settled: Settled, *, in_a_row: int) -> None:
        """Record which of the last steps counted."""
        metrics = self.metrics
        metrics.images.inc(settled.trained)
        metrics.samples.labels("trained").inc(settled.trained)
        metrics.nonfinite_steps.inc(settled.skipped_steps)
        metrics.nonfinite_consecutive.set(in_a_row)
        if settled.skipped_steps:
            self._reporter.event(
                "skipped_steps",
                f"{settled.skipped_steps} steps were skipped: their loss or gradient was not finite",
                steps=settled.skipped_steps,
                in_a_row=in_a_row,
            )

    def put_off(self, step: int) -> None:
        """Tell that a checkpoint waits for a step that is finite."""
        self._reporter.event("put_off", "the checkpoint waits for a step that is finite", step=step)

    def passed_over(self, each: PassedOver, shard: str) -> None:
        """Record bytes of a shard that are not trained."""
        self.metrics.samples.labels(each.outcome).inc(each.ordinal is not None)
        if each.outcome == "quarantined":
            self.metrics.quarantined_bytes.labels(each.reason).inc(each.stop - each.start)
        if each.reason in LOST_REASONS:
            self.metrics.stream_shards.labels("lost").inc()
            self._reporter.event(
                "lost_shard",
                f"{shard}: {each.reason}; its bytes from {each.start} on are quarantined",
                shard=shard,
                reason=each.reason,
            )

    def waiting(self, idle: bool) -> None:
        """Tell that a followed stream has nothing left for now, or has something again."""
        self._watchdog.enter("waiting" if idle else "step")
        if idle:
            self._reporter.event("waiting", "everything listed is trained: waiting for new shards")
        self._enter("waiting" if idle else "training")

    def grown(self, manifest: Manifest) -> None:
        """Record that shards joined the run."""
        self.metrics.stream_shards.labels("manifest").set(len(manifest.shards))

    def log(
        self,
        *,
        step: int,
        images: int,
        fraction: float,
        rate: float,
        quarantined: int,
        read: Callable[[], Mapping[str, float]],
    ) -> None:
        """Read the loss and what else there is from the device, tell it; every rank, after the same step."""
        if self._steps == 0:
            return
        counted = int(self._counted)
        loss = self._mean_over_ranks(float(self._losses) / counted if counted else math.nan)
        readings = read()
        now = time.perf_counter()
        seconds = max(now - self._logged, 1e-9)
        elapsed = now - self._began
        self.loss_last = loss
        self.metrics.loss.set(loss)
        self.metrics.note(readings)
        since = images - self._images_begun
        speed = (images - self._images_logged) / seconds
        overall = since / max(elapsed, 1e-9)
        left = images * (1 - fraction) / fraction if fraction else math.nan
        self.metrics.run_images_remaining.set(left)
        self._reporter.progress(
            Progress(
                step=step,
                images=images,
                fraction=fraction,
                loss=loss,
                rate=rate,
                images_per_second=speed,
                data_wait_ratio=min(1.0, self._phases.get("data_wait", 0.0) / seconds),
                readings=readings,
                quarantined=quarantined,
                seconds_left=left / overall if overall and math.isfinite(left) else None,
            )
        )
        self._logged, self._images_logged, self._phases, self._steps = now, images, {}, 0
        self._losses.zero_()
        self._counted.zero_()

    @property
    def images_per_second(self) -> float:
        """Speed over all that this process trained."""
        return (self._trained - self._images_begun) / max(self._stepped - self._began, 1e-9)

    def staged(self, seconds: float) -> None:
        """Record for how long training stood still for a snapshot."""
        self.metrics.checkpoint_duration.labels("stage").observe(seconds)

    def save_delayed(self) -> None:
        """Record that a checkpoint is put off, since the one before is still being written."""
        self.metrics.checkpoints.labels("delayed").inc()

    def save_failed(self, reason: str) -> None:
        """Record a checkpoint that could not be written."""
        self.metrics.checkpoints.labels("failed").inc()
        self._reporter.event("warning", reason)

    def saved(self, checkpoint: Checkpoint, seconds: float) -> None:
        """Record a checkpoint that is committed, and how long its writing took."""
        self.metrics.checkpoint_duration.labels("upload").observe(seconds)
        self.metrics.checkpoints.labels("ok").inc()
        self.metrics.checkpoint_last_success_timestamp.set(time.time())
        self.metrics.checkpoint_last_success_step.set(checkpoint.step)
        self.metrics.checkpoint_bytes.set(checkpoint.size)
        self._reporter.event("checkpoint", f"saved {checkpoint.url}", step=checkpoint.step)

    def describe(self, manifest: Manifest, about: Mapping[str, str]) -> None:
        """Record what runs."""
        self.metrics.run_info.info(dict(about))
        self.metrics.stream_shards.labels("manifest").set(len(manifest.shards))

    @contextmanager
    def _within(self, state: str, phase: str) -> Iterator[None]:
        self.metrics.set_state(state)
        with self.phase(phase):
            yield
        self.metrics.set_state(self._state)

    def _enter(self, state: str) -> None:
        self._state = state
        self.metrics.set_state(state)

    def _account(self, phase: str, seconds: float) -> None:
        self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        self._accounted += seconds
        self.metrics.step_phase.labels(phase).inc(seconds)

    def _mean_over_ranks(self, value: float) -> float:
        return sum(self._ranks.gather(value)) / self._ranks.world_size
