"""What ranks measure of themselves at a log line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from streamswav.telemetry.metrics import Metrics
from streamswav.training.distributed import Ranks
from streamswav.training.outlook import Outlook

COMPUTE_PHASES = ("h2d", "forward_backward", "optimizer")
"""Phases in which a rank mostly works for itself; in others it waits for data or for its peers."""


def compute_seconds(phases: Mapping[str, float], steps: int) -> float:
    """Return the seconds of a step in which this rank worked, mean over the steps."""
    return sum(phases.get(each, 0.0) for each in COMPUTE_PHASES) / max(1, steps)


def show_spread(metrics: Metrics, by_rank: Sequence[float]) -> None:
    """Set how the ranks' seconds of a step differ, and which rank is the slowest."""
    _set_statistics(metrics, "rank_compute_seconds", by_rank)
    metrics.set("rank_slowest", max(range(len(by_rank)), key=by_rank.__getitem__))


def show_outlook(metrics: Metrics, outlook: Outlook) -> None:
    """Set what is ahead of the stream."""
    if outlook.samples is not None:
        metrics.set("stream_samples_remaining", outlook.samples)
    _set_statistics(metrics, "lane_lag_samples", outlook.lags or [0.0])


def _set_statistics(metrics: Metrics, name: str, values: Sequence[float]) -> None:
    metrics.set(name, min(values), "min")
    metrics.set(name, statistics.median(values), "median")
    metrics.set(name, max(values), "max")


class GpuMeter:
    """Tells of the memory of a rank's GPU, which torch's allocator knows without asking it.

    **Not yet run on a GPU.**
    """

    def __init__(self, metrics: Metrics, ranks: Ranks) -> None:
        self._metrics, self._device, self._label = metrics, ranks.device, str(ranks.local_rank)
        self._retries = 0

    def show(self) -> None:
        """Set what is held and what there is; nothing without a GPU."""
        if self._device.type != "cuda":
            return
        found, metrics = torch.cuda.memory_stats(self._device), self._metrics
        metrics.set("gpu_memory_reserved_peak_bytes", found.get("reserved_bytes.all.peak", 0), self._label)
        whole = torch.cuda.get_device_properties(self._device).total_memory
        metrics.set("gpu_memory_total_bytes", whole, self._label)
        retries = found.get("num_alloc_retries", 0)
        metrics.add("gpu_alloc_retries_total", max(0, retries - self._retries))
        self._retries = retries
