"""Every Prometheus family of streamswav, declared once. Names and labels follow Prometheus' conventions.

A registry is passed in, so that tests and several runs in one process do not meet. Every known label value
is exported as 0 from the start; timestamps hold the start of the process until their event.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

PREFIX = "streamswav"
RUN_STATES = ("init", "training", "waiting", "evaluating", "checkpoint", "draining", "done", "failed")
PHASES = ("data_wait", "h2d", "forward_backward", "checkpoint", "evaluation", "other")
STAGES = ("fetch", "parse", "decode", "collate")
SAMPLE_OUTCOMES = ("trained", "excluded", "filtered", "quarantined", "skipped_step")
REQUEST_OUTCOMES = ("ok", "throttled", "error", "timeout")
_CHECKPOINT_BUCKETS = tuple(0.01 * 2.0**i for i in range(18))
_STEP_BUCKETS = tuple(0.05 * 1.5**i for i in range(15))


class Metrics:
    """The families, as attributes named like the metric without its prefix and unit of counting."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.run_info = Info(
            f"{PREFIX}_run", "What runs: version, world size, configuration", registry=self.registry
        )
        self.run_state = self._gauge("run_state", "1 for the state that the run is in", "state")
        self.step = self._gauge("step", "Optimizer steps done")
        self.images = self._counter("images", "Images trained since the process started")
        self.run_images_remaining = self._gauge("run_images_remaining", "Images until the run is done")
        self.last_step_timestamp = self._gauge("last_step_timestamp_seconds", "When the last step was done")
        self.process_start_timestamp = self._gauge(
            "process_start_timestamp_seconds", "When the process began"
        )
        self.step_duration = Histogram(
            f"{PREFIX}_step_duration_seconds",
            "Time from step to step",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.step_phase = self._counter("step_phase_seconds", "Wall time of the rank by phase", "phase")
        self.loss = self._gauge(
            "loss", "Loss of the last logged step; in pretraining the swapped prediction's"
        )
        self.prototypes = self._gauge("prototypes", "K; an untrained or collapsed model has the loss ln K")
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last step")
        self.prototype_usage = self._gauge(
            "prototype_usage_ratio", "Share of prototypes that are some image's best, over the log interval"
        )
        self.probe_accuracy = self._gauge(
            "probe_accuracy_ratio", "Share of labelled images beside the stream classified right", "probe"
        )
        self.nonfinite_steps = self._counter(
            "nonfinite_steps", "Steps that were skipped since loss or gradient was not finite"
        )
        self.nonfinite_consecutive = self._gauge("nonfinite_steps_consecutive", "Such steps in a row, now")
        self.checkpoint_last_success_timestamp = self._gauge(
            "checkpoint_last_success_timestamp_seconds", "When the last checkpoint was committed"
        )
        self.checkpoint_last_success_step = self._gauge("checkpoint_last_success_step", "Step it holds")
        self.checkpoint_interval = self._gauge("checkpoint_interval_seconds", "Configured interval")
        self.checkpoint_bytes = self._gauge("checkpoint_bytes", "Size of the last checkpoint")
        self.checkpoint_duration = Histogram(
            f"{PREFIX}_checkpoint_duration_seconds",
            "Staging, for which training waits, and upload, for which it does not",
            ("phase",),
            buckets=_CHECKPOINT_BUCKETS,
            registry=self.registry,
        )
        self.checkpoints = self._counter(
            "checkpoints",
            "Checkpoints by outcome; delayed: put off behind one still being written",
            "outcome",
        )
        self.checkpoint_copies = self._counter(
            "checkpoint_copies", "Copies to checkpoint.copy_to by outcome", "outcome"
        )
        self.samples = self._counter("samples", "Samples by outcome", "outcome")
        self.quarantined_bytes = self._counter("quarantined_bytes", "Bytes not trained, by reason", "reason")
        self.s3_requests = self._counter(
            "s3_requests", "Requests behind rank 0's batches, every attempt", "outcome"
        )
        self.s3_received_bytes = self._counter("s3_received_bytes", "Bytes received for rank 0's batches")
        self.cache_reads = self._counter(
            "cache_reads", "Reads behind rank 0's batches that storage.cache could answer", "outcome"
        )
        self.stage_seconds = self._counter("stage_seconds", "Time of the loader processes by stage", "stage")
        self.stream_shards = self._gauge("stream_shards", "Shards in the manifest, and those lost", "state")
        self._begin()

    def note(self, readings: Mapping[str, float]) -> None:
        """Set those of a task's readings that have a family."""
        if "prototype_usage_ratio" in readings:
            self.prototype_usage.set(readings["prototype_usage_ratio"])

    def set_state(self, state: str) -> None:
        """Set the one state that the run is in."""
        for each in RUN_STATES:
            self.run_state.labels(each).set(each == state)

    def _begin(self) -> None:
        now = time.time()
        for timestamp in (
            self.process_start_timestamp,
            self.last_step_timestamp,
            self.checkpoint_last_success_timestamp,
        ):
            timestamp.set(now)
        self.set_state("init")
        known = (
            (self.step_phase, PHASES),
            (self.stage_seconds, STAGES),
            (self.samples, SAMPLE_OUTCOMES),
            (self.s3_requests, REQUEST_OUTCOMES),
            (self.cache_reads, ("hit", "miss")),
            (self.checkpoints, ("ok", "failed", "delayed")),
            (self.checkpoint_copies, ("ok", "failed")),
            (self.checkpoint_duration, ("stage", "upload")),
        )
        for state in ("manifest", "lost"):
            self.stream_shards.labels(state)
        for counter, values in known:
            for value in values:
                counter.labels(value)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)
