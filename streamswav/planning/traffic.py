"""What goes over the network: between the ranks in each step, and from the bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamswav.config import Config
from streamswav.defaults import known
from streamswav.planning.rehearsal import Rehearsal

SAMPLE_BYTES = 110_000
"""Bytes of a sample in its shard where nothing else is known: a photograph of 500 x 375, as ImageNet's."""
FULL_RATE = 507.0
"""Images a second that one CPU core decodes and crops for a GPU that augments (500 x 375, 2x224 + 6x96)."""
CPU_RATE = 141.0
"""The same, augmented on the core as well."""
_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True)
class Network:
    """Bytes that one GPU sends in a step (it receives as many), but for storage, which it receives.

    Attributes:
        storage: samples from the bucket.
        gradients: their all-reduce.
        sinkhorn: sums over the prototypes.
        batch_norm: statistics of SyncBatchNorm, forward and backward.
        bytes_per_second: of all of it, at the estimated speed.
    """

    storage: int
    gradients: int
    sinkhorn: int
    batch_norm: int
    bytes_per_second: float


@dataclass(frozen=True)
class Loader:
    """What the CPU has to do for one GPU.

    Attributes:
        images_per_second: that the GPU takes.
        images_per_core: that a core gives; on photographs of 500 x 375.
        cores: for one GPU.
        cores_if_cpu_augmented: if the GPU did not augment.
        workers: loader processes that the rules choose.
    """

    images_per_second: float
    images_per_core: float
    cores: int
    cores_if_cpu_augmented: int
    workers: int


@dataclass(frozen=True)
class Reading:
    """What is read from the bucket in the whole run; None where the size of the data is not known.

    Attributes:
        bytes: of all passes.
        requests: GETs of at most `storage.block_bytes`, one more for each lane of a pass.
        listed: whether sizes are those of the listing.
    """

    bytes: int
    requests: int
    listed: bool


def count_network(
    rehearsal: Rehearsal, config: Config, *, world_size: int, sample_bytes: float, step_seconds: float
) -> Network:
    """Count what a GPU sends in one step; an all-reduce goes around in a ring."""
    local = known(config.training.batch) // world_size
    storage = round(local * sample_bytes)
    gradients = _ring(rehearsal.parameters * _FLOAT, world_size)
    sinkhorn = _ring(sinkhorn_bytes(config), world_size)
    batch_norm = _sync_batch_norm(rehearsal, config, world_size)
    rate = (storage + gradients + sinkhorn + batch_norm) / step_seconds
    return Network(storage, gradients, sinkhorn, batch_norm, rate)


def sinkhorn_bytes(config: Config) -> int:
    """Bytes that Sinkhorn reduces over the ranks in a step: maxima once, then sums in double precision."""
    swav = config.swav
    iterations, values = known(swav.iterations), len(swav.assigned_crops) * known(swav.prototypes)
    return values * (_FLOAT + iterations * _DOUBLE) if iterations else 0


def count_loader(config: Config, rate: float) -> Loader:
    """Count the cores that keep up with a GPU of this speed."""
    workers = known(config.loader.workers)
    return Loader(rate, FULL_RATE, math.ceil(rate / FULL_RATE), math.ceil(rate / CPU_RATE), workers)


def count_reading(
    config: Config, *, samples: int | None, sample_bytes: float, sizes: Sequence[tuple[int, int]] = ()
) -> Reading | None:
    """Count bytes and GETs of the whole run.

    Args:
        config: resolved.
        samples: of the whole run, where they are known.
        sample_bytes: of each in its shard.
        sizes: (bytes, passes) of every shard that was listed.
    """
    block, stream = config.storage.block_bytes, config.stream
    begun = known(stream.columns) * known(stream.rows) * stream.turns
    if sizes:
        total = sum(size * passes for size, passes in sizes)
        requests = sum(math.ceil(size / block) * passes for size, passes in sizes)
        return Reading(total, requests + begun, listed=True)
    if samples is None:
        return None
    total = round(samples * sample_bytes)
    return Reading(total, math.ceil(total / block) + begun, listed=False)


def _ring(size: int, ranks: int) -> int:
    return round(2 * size * (ranks - 1) / ranks)


def _sync_batch_norm(rehearsal: Rehearsal, config: Config, world_size: int) -> int:
    """In a forward pass means, deviations and counts are gathered, in a backward one two sums reduced."""
    share = min(config.training.sync_batch_norm or world_size, world_size)
    if share == 1:
        return 0
    trunk, head = rehearsal.normalised
    training = config.training
    passes = len(_joined(config.crops.sizes)) * training.micro_batches
    forward = 2 if training.activation_checkpointing or training.micro_batches > 1 else 1
    total = 0
    for channels, times, again in ((trunk, passes, forward), (head, 1, 1)):
        for each in channels:
            gathered = again * (2 * each + 1) * _FLOAT * (share - 1)
            total += times * (gathered + _ring(2 * each * _FLOAT, share))
    return total


def _joined(sizes: Sequence[int]) -> list[int]:
    """Neighbouring resolutions of one size go through the trunk together."""
    return [size for at, size in enumerate(sizes) if at == 0 or sizes[at - 1] != size]
