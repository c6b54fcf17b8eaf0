"""Where the time of a run goes, what it learns, and when it says so."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch

from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import LOST_REASONS, PassedOver
from streamswav.stream.store import redact
from streamswav.telemetry.families import FAMILIES
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Progress, Reporter
from streamswav.telemetry.status import Status
from streamswav.telemetry.verdict import VERDICTS, Moment, Verdict
from streamswav.training.checkpoint import Checkpoint
from streamswav.training.distributed import Ranks
from streamswav.training.health import Health
from streamswav.training.learner import StepResult
from streamswav.training.measures import GpuMeter, compute_seconds, show_outlook, show_spread
from streamswav.training.open_steps import Settled
from streamswav.training.outlook import Outlook
from streamswav.training.phases import make_clock
from streamswav.training.watchdog import Watchdog

_IN_STATUS = ("step", "images", "fraction", "images_per_second", "seconds_left", "loss")


class Monitor:
    """Feeds metrics and the log. Nothing is read from the device between two logs.

    Attributes:
        loss_first: loss of the run's first step.
        loss_last: mean loss of the steps between the last two logs.
        images_per_second: over this process' whole training.
        images_bound: images a second of all ranks that the arithmetic of their GPUs allows; None: not known.
        hopeless: the verdict after which the run is to end; the same on all ranks.
    """

    def __init__(
        self,
        metrics: Metrics,
        reporter: Reporter,
        ranks: Ranks,
        *,
        log_seconds: float,
        watchdog: Watchdog | None = None,
        status: Status | None = None,
        health: Health | None = None,
    ) -> None:
        self._watchdog, self._status = watchdog or Watchdog(), status or Status()
        self._health = health
        self.hopeless: Verdict | None = None
        self.metrics, self._reporter, self._ranks = metrics, reporter, ranks
        self._log_seconds = log_seconds
        self.loss_first: float | None = None
        self.loss_last = math.nan
        self._began = self._logged = self._stepped = time.perf_counter()
        self.clock = make_clock(ranks.device)
        self._phases: defaultdict[str, float] = defaultdict(float)
        self._state = "init"
        self._images_begun = self._images_logged = 0
        self._gpu = GpuMeter(metrics, ranks)
        self.images_bound: float | None = None
        self._grad_norm = torch.zeros((), device=ranks.device)
        self._losses = torch.zeros((), device=ranks.device)
        self._counted = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._steps = 0
        self._trained = self._lost_shards = 0

    def begin(self, *, step: int, images: int, loss_first: float | None) -> None:
        """Start the clocks; `step` steps were done before this process, with `images`."""
        self._began = self._logged = self._stepped = time.perf_counter()
        self.clock.start()
        self._images_begun = self._images_logged = self._trained = images
        self.loss_first = loss_first
        self.metrics.set("step", step)
        self._enter("training")

    def done(self) -> None:
        """Tell that the run is done."""
        self._enter("done")

    def draining(self) -> None:
        """Tell that the run stops after a signal."""
        self._enter("draining")

    def log_due(self) -> bool:
        """Tell whether it is time for a log line; the first step gets one at once."""
        return self.loss_first is None or time.perf_counter() - self._logged >= self._log_seconds

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
            self.metrics.set("probe_accuracy_ratio", share, name)
        if scores:
            shown = ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
            self._reporter.event("probe", shown, step=step, images=images, **scores)

    def stepped(
        self, result: StepResult, *, step: int, images: int, rate: float, watch: Callable[[], None]
    ) -> None:
        """Record one step, and have its task watch it."""
        self._watchdog.enter("step")
        if self.loss_first is None:  # the first step is logged at once, so it may be read
            first = self._mean_over_ranks(float(result.loss))
            self.loss_first = first if math.isfinite(first) else None
        began = time.perf_counter()
        watch()
        self._grad_norm = result.grad_norm
        # A loss that is not finite was skipped with its step.
        self._losses += torch.where(result.skipped, 0.0, result.loss)
        self._counted += result.skipped.logical_not()
        self._steps += 1
        metrics, now = self.metrics, time.perf_counter()
        metrics.observe("step_duration_seconds", now - self._stepped)
        self._account(self.clock.take())
        metrics.set("step", step)
        metrics.set("last_step_timestamp_seconds", time.time())
        metrics.set("learning_rate", rate)
        self._stepped, self._trained = now, images
        metrics.add("telemetry_seconds_total", time.perf_counter() - began)

    def settled(self, settled: Settled, *, in_a_row: int) -> None:
        """Record which of the last steps counted."""
        metrics = self.metrics
        metrics.add("images_total", settled.trained)
        metrics.add("samples_total", settled.trained, "trained")
        metrics.add("nonfinite_steps_total", settled.skipped_steps)
        metrics.set("nonfinite_steps_consecutive", in_a_row)
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
        self.metrics.add("samples_total", each.ordinal is not None, each.outcome)
        if each.outcome == "quarantined":
            self.metrics.add("quarantined_bytes_total", each.stop - each.start, each.reason)
        if each.reason in LOST_REASONS:
            self._lost_shards += 1
            self.metrics.set("stream_shards", self._lost_shards, "lost")
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
        self.metrics.set("stream_shards", len(manifest.shards), "manifest")

    def log(
        self,
        *,
        step: int,
        images: int,
        fraction: float,
        rate: float,
        quarantined: int,
        read: Callable[[], Mapping[str, float]],
        ahead: Callable[[], Outlook] | None = None,
    ) -> None:
        """Read the loss and what else there is from the device, tell it; every rank, after the same step."""
        if self._steps == 0:
            self._account(self.clock.take())
            return
        with self.clock.waiting():
            counted = int(self._counted)
        self._account(self.clock.settle())
        own = float(self._losses) / counted if counted else math.nan
        shares = self._ranks.gather((own, compute_seconds(self._phases, self._steps)))
        loss = sum(each for each, _ in shares) / len(shares)
        began = time.perf_counter()
        readings = {"gradient_norm/all": float(self._grad_norm), **read()}
        now = time.perf_counter()
        seconds = max(now - self._logged, 1e-9)
        elapsed = now - self._began
        self.loss_last = loss
        self.metrics.set("loss", loss)
        self.metrics.note(readings)
        self._judge(Moment(step, images, loss, readings))
        since = images - self._images_begun
        speed = (images - self._images_logged) / seconds
        overall = since / max(elapsed, 1e-9)
        left = images * (1 - fraction) / fraction if fraction else math.nan
        self.metrics.set("run_images_remaining", left)
        progress = Progress(
            step=step,
            images=images,
            fraction=fraction,
            loss=loss,
            rate=rate,
            images_per_second=speed,
            data_wait_ratio=min(1.0, self._phases["data_wait"] / seconds),
            readings=readings,
            quarantined=quarantined,
            seconds_left=left / overall if overall and math.isfinite(left) else None,
            verdict=self._health.verdict.name if self._health and self._health.verdict else None,
        )
        self._reporter.progress(progress)
        told = asdict(progress)
        self._status.update(**{name: told[name] for name in _IN_STATUS})
        show_spread(self.metrics, [seconds for _, seconds in shares])
        self._gpu.show()
        if self.images_bound is not None:
            self.metrics.set("mfu_ratio", speed / self.images_bound)
        if ahead is not None and self._ranks.leads:
            show_outlook(self.metrics, ahead())
        self.metrics.add("telemetry_seconds_total", time.perf_counter() - began)
        self._logged, self._images_logged, self._phases, self._steps = now, images, defaultdict(float), 0
        self._losses.zero_()
        self._counted.zero_()

    def _judge(self, moment: Moment) -> None:
        """Have rank 0 judge a log line; where there is no hope any more all ranks know it."""
        health = self._health
        if health is None:
            return

        def hear() -> Verdict | None:
            if (verdict := health.hear(moment)) is not None:
                self._tell_verdict(verdict, moment)
            return health.hopeless

        self.hopeless = self._ranks.lead(hear)

    def _tell_verdict(self, verdict: Verdict, moment: Moment) -> None:
        name, remedies = verdict.name, [str(each) for each in verdict.remedies]
        self.metrics.choose("verdict", name, VERDICTS)
        self._status.update(verdict={"name": name, "sentence": verdict.sentence, "remedies": remedies})
        tried = "".join(f"; try {each}" for each in remedies[:1])
        self._reporter.event(
            "verdict",
            f"{name}: {verdict.sentence}{tried}",
            verdict=name,
            sentence=verdict.sentence,
            remedies=remedies,
            step=moment.step,
            images=moment.images,
        )

    @property
    def images_per_second(self) -> float:
        """Speed over all that this process trained."""
        return (self._trained - self._images_begun) / max(self._stepped - self._began, 1e-9)

    def staged(self, seconds: float) -> None:
        """Record for how long training stood still for a snapshot."""
        self.metrics.observe("checkpoint_duration_seconds", seconds, "stage")

    def save_delayed(self) -> None:
        """Record that a checkpoint is put off, since the one before is still being written."""
        self.metrics.add("checkpoints_total", 1, "delayed")

    def save_failed(self, reason: str) -> None:
        """Record a checkpoint that could not be written."""
        self.metrics.add("checkpoints_total", 1, "failed")
        self._reporter.event("warning", reason)

    def saved(self, checkpoint: Checkpoint, seconds: float) -> None:
        """Record a checkpoint that is committed, and how long its writing took."""
        self.metrics.observe("checkpoint_duration_seconds", seconds, "upload")
        self.metrics.add("checkpoints_total", 1, "ok")
        self.metrics.set("checkpoint_last_success_timestamp_seconds", time.time())
        self.metrics.set("checkpoint_last_success_step", checkpoint.step)
        self.metrics.set("checkpoint_bytes", checkpoint.size)
        self._status.update(
            last_checkpoint={
                "url": redact(checkpoint.url),
                "step": checkpoint.step,
                "timestamp": round(time.time(), 3),
            }
        )
        self._reporter.event("checkpoint", f"saved {checkpoint.url}", step=checkpoint.step)

    def describe(self, manifest: Manifest, about: Mapping[str, str]) -> None:
        """Record what runs."""
        self.metrics.set("run_info", 1, *(about[name] for name in FAMILIES["run_info"].labels))
        self.metrics.set("stream_shards", len(manifest.shards), "manifest")

    @contextmanager
    def _within(self, state: str, phase: str) -> Iterator[None]:
        self._show(state)
        with self.clock.within(phase):
            yield
        self._account(self.clock.take())
        self._show(self._state)

    def _enter(self, state: str) -> None:
        self._state = state
        self._show(state)

    def _show(self, state: str) -> None:
        self.metrics.set_state(state)
        self._status.update(state=state)

    def _account(self, spent: Mapping[str, float]) -> None:
        for phase, seconds in spent.items():
            self._phases[phase] += seconds
            self.metrics.add("step_phase_seconds_total", seconds, phase)

    def _mean_over_ranks(self, value: float) -> float:
        return sum(self._ranks.gather(value)) / self._ranks.world_size
