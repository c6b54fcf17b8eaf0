"""Every Prometheus family of streamswav, declared once: name, type, labels, who feeds it, how it adds up.

Names and labels follow Prometheus' conventions: base units, `_total` for what only rises, the moment of an
event rather than its age. Labels are few: the run comes from the pod, and no series grows with the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PREFIX = "streamswav_"

Kind = Literal["gauge", "counter", "histogram"]
Feeder = Literal["leader", "state", "rank", "reader", "pod"]
"""Who knows a family's values.

leader: rank 0, of the whole run; state: rank 0 and its launcher, which outlives it; rank: every rank, of
itself; reader: whatever process reads the stream, so loader processes too; pod: the launcher, or the one
process there is.
"""
Mode = Literal["mostrecent", "livemostrecent", "livesum"]
"""What one endpoint makes of a gauge that several processes set: the last value, also of a process that has
ended; the last of those that live; or the sum of these."""

RUN_STATES = ("init", "training", "waiting", "evaluating", "checkpoint", "draining", "done", "failed")
PHASES = (
    "data_wait",
    "h2d",
    "forward_backward",
    "sinkhorn",
    "allreduce",
    "optimizer",
    "checkpoint",
    "evaluation",
    "other",
)
STAGES = ("fetch", "parse", "decode", "crop", "collate")
SAMPLE_OUTCOMES = ("trained", "excluded", "filtered", "quarantined", "skipped_step")
REQUEST_OUTCOMES = ("ok", "throttled", "error", "timeout")
OPEN_OUTCOMES = ("ok", "missing", "changed", "error")
PARTS = ("all", "trunk", "head", "prototypes")
WORKER_STATES = ("busy", "waiting")
STATISTICS = ("min", "median", "max")
EXIT_REASONS = (
    "ok",
    "drained",
    "cuda_oom",
    "host_oom",
    "shm",
    "nccl_timeout",
    "hang",
    "peer",
    "nonfinite",
    "data",
    "storage",
    "config",
    "signal",
    "other",
)
VERDICTS = (
    "healthy",
    "warming_up",
    "stuck",
    "dimensional_collapse",
    "prototype_collapse",
    "queue_rebound",
    "diverging",
)

_STEP_BUCKETS = tuple(0.05 * 1.5**i for i in range(15))
_CHECKPOINT_BUCKETS = tuple(0.01 * 2.0**i for i in range(18))
_REQUEST_BUCKETS = tuple(0.005 * 2.0**i for i in range(15))


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: as it is exported, without the prefix.
        kind: its type.
        text: its help.
        labels: names of its labels, each with the values known beforehand, which are 0 from the start.
        fed_by: who feeds it.
        mode: of a gauge.
        buckets: of a histogram, seconds.
        moment: it is a moment, and that of the start until there is another.
    """

    name: str
    kind: Kind
    text: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fed_by: Feeder = "leader"
    mode: Mode = "mostrecent"
    buckets: tuple[float, ...] = ()
    moment: bool = False


def _gauge(
    name: str,
    text: str,
    fed_by: Feeder = "leader",
    *,
    mode: Mode = "mostrecent",
    moment: bool = False,
    **labels: tuple[str, ...],
) -> Family:
    return Family(name, "gauge", text, labels, fed_by, mode, moment=moment)


def _counter(name: str, text: str, fed_by: Feeder = "leader", **labels: tuple[str, ...]) -> Family:
    return Family(name, "counter", text, labels, fed_by)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...],
    fed_by: Feeder = "leader",
    **labels: tuple[str, ...],
) -> Family:
    return Family(name, "histogram", text, labels, fed_by, buckets=buckets)


_RUN = (
    _gauge(
        "run_info",
        "What runs: restarts in this pod so far, version, commit, ranks, configuration",
        mode="livemostrecent",
        attempt=(),
        version=(),
        git_sha=(),
        world_size=(),
        config_hash=(),
    ),
    _gauge("run_state", "1 for the state that the run is in", "state", state=RUN_STATES),
    _gauge("step", "Optimizer steps done"),
    _counter("images_total", "Images trained since this pod started"),
    _gauge("run_images_remaining", "Images until the run is done"),
    _gauge("last_step_timestamp_seconds", "When the last step was done", moment=True),
    _gauge("process_start_timestamp_seconds", "When the run was started, or started again", moment=True),
    _counter("worker_exits_total", "Ranks that ended, by reason", "pod", reason=EXIT_REASONS),
)
_SPEED = (
    _histogram("step_duration_seconds", "Time from step to step", _STEP_BUCKETS),
    _counter(
        "step_phase_seconds_total",
        "Wall time of training on rank 0 by phase; allreduce: of gradients, as far as it is waited for",
        phase=PHASES,
    ),
    _gauge("mfu_ratio", "Floating point operations of the steps to what the GPU could do in their time"),
    _gauge(
        "rank_compute_seconds",
        "Seconds of a step in h2d, forward_backward and optimizer, over the ranks",
        stat=STATISTICS,
    ),
    _gauge("rank_slowest", "Number of the rank that takes longest for them"),
    _counter("telemetry_seconds_total", "Time that a rank spends on metrics, log and health", "rank"),
)
_LEARNING = (
    _gauge(
        "loss", "Mean loss of the steps since the log line before; in pretraining the swapped prediction's"
    ),
    _gauge("prototypes", "K; an untrained or collapsed model has the loss ln K"),
    _gauge("learning_rate", "Learning rate of the last step"),
    _gauge(
        "gradient_norm", "Norm of the gradient at the last logged step, by part of the network", part=PARTS
    ),
    _gauge("prototype_usage_ratio", "Share of prototypes that are some image's best, over a window"),
    _gauge("prototypes_unique_ratio", "Share of prototypes that differ from all before them"),
    _gauge("assignment_entropy_ratio", "Entropy of the mean softmax over the prototypes to ln K"),
    _gauge("assignment_information_ratio", "What that softmax tells of its image, to ln K: 0 when stuck"),
    _gauge("embedding_std_ratio", "Spread of the embeddings' coordinates times sqrt(D): 1 is isotropic"),
    _gauge("rankme", "RankMe of the trunk's features"),
    _gauge("embedding_rankme", "RankMe of the embeddings"),
    _gauge("crop_agreement_ratio", "Share of pairs of crops that have the same best prototype"),
    _gauge("queue_fill_ratio", "Share of the queue that is filled"),
    _gauge("queue_staleness_ratio", "How far the queue's embeddings are behind the network, 0 to 1"),
    _gauge("verdict", "1 for what the health of the representation comes to", verdict=VERDICTS),
    _counter("nonfinite_steps_total", "Steps that were skipped since loss or gradient was not finite"),
    _gauge("nonfinite_steps_consecutive", "Such steps in a row, now"),
    _gauge("probe_accuracy_ratio", "Share of labelled images beside the stream classified right", probe=()),
)
_CHECKPOINTS = (
    _gauge(
        "checkpoint_last_success_timestamp_seconds", "When the last checkpoint was committed", moment=True
    ),
    _gauge("checkpoint_last_success_step", "Step it holds"),
    _gauge("checkpoint_interval_seconds", "Configured interval"),
    _gauge("checkpoint_bytes", "Size of the last checkpoint"),
    _histogram(
        "checkpoint_duration_seconds",
        "Staging, for which training waits, and upload, for which it does not",
        _CHECKPOINT_BUCKETS,
        phase=("stage", "upload"),
    ),
    _counter(
        "checkpoints_total",
        "Checkpoints by outcome; delayed: put off behind one still being written",
        outcome=("ok", "failed", "delayed"),
    ),
    _counter("checkpoint_copies_total", "Copies to checkpoint.copy_to by outcome", outcome=("ok", "failed")),
)
_STREAM = (
    _counter(
        "shard_opens_total", "Shards that were begun to be read, by outcome", "reader", outcome=OPEN_OUTCOMES
    ),
    _counter("samples_total", "Samples by outcome", outcome=SAMPLE_OUTCOMES),
    _counter("quarantined_bytes_total", "Bytes not trained, by reason", reason=()),
    _counter(
        "s3_requests_total", "Requests over the network, every attempt", "reader", outcome=REQUEST_OUTCOMES
    ),
    _histogram("s3_request_duration_seconds", "Time of these attempts", _REQUEST_BUCKETS, "reader"),
    _counter("s3_received_bytes_total", "Bytes received over the network", "reader"),
    _counter("cache_reads_total", "Reads that storage.cache could answer", "reader", outcome=("hit", "miss")),
    _gauge("prefetch_queue_items", "Batches that wait for the ranks of this pod", "rank", mode="livesum"),
    _gauge("prefetch_queue_capacity_items", "Batches that can wait for them", "rank", mode="livesum"),
    _gauge(
        "stream_samples_remaining", "Samples of the stream not yet trained, all passes; estimated by bytes"
    ),
    _gauge("stream_shards", "Shards in the manifest, and those lost", state=("manifest", "lost")),
    _gauge(
        "lane_lag_samples",
        "How many samples lanes hold beyond the lane that ends first; estimated by bytes",
        stat=STATISTICS,
    ),
    _gauge(
        "dataloader_workers",
        "Loader processes of this pod that make a batch, or wait until one is wanted",
        "reader",
        mode="livesum",
        state=WORKER_STATES,
    ),
    _counter("stage_seconds_total", "Time of the loader processes by stage", "reader", stage=STAGES),
)
_RESOURCES = (
    _gauge(
        "gpu_memory_reserved_peak_bytes",
        "Most GPU memory that torch has held",
        "rank",
        mode="livemostrecent",
        local_rank=(),
    ),
    _gauge("gpu_memory_total_bytes", "Memory of the GPU", "rank", mode="livemostrecent", local_rank=()),
    _counter("gpu_alloc_retries_total", "Allocations on the GPU that had to free cached memory", "rank"),
    _gauge("shm_used_bytes", "Bytes used of /dev/shm", "pod"),
    _gauge("shm_size_bytes", "Size of /dev/shm", "pod"),
)

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (*_RUN, *_SPEED, *_LEARNING, *_CHECKPOINTS, *_STREAM, *_RESOURCES)
}
