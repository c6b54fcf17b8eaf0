"""What the ranks of one machine need of it: memory, shared memory, open files, processes and threads.

Sizes of batches follow from the configuration. What Python, torch and their threads take is measured, on two
CPU cores with two ranks of two loader processes: 310 MB for the launcher and 420 MB for a rank before
its model, 130 MB for the fork server's share and each loader process, pages that the kernel can take back
left out; 33 files and 11 threads a rank, 23 and 8 a loader
process. That of CUDA is an allowance, not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.config import Config
from streamswav.defaults import known
from streamswav.errors import ConfigError
from streamswav.planning.traffic import SAMPLE_BYTES
from streamswav.stream.memory import share_memory

PYTHON = 320 << 20
"""Bytes of a process that has imported torch, before it does anything."""
RANK = 448 << 20
"""The same of one that has imported what trains."""
FORKED = 160 << 20
"""The same of one that was forked from the fork server."""
CUDA = 2 << 30
"""Bytes on the host of a rank that uses a GPU: context, pinned pages, NCCL (allowance)."""

_CONNECTIONS = 64
_RANK_FILES, _WORKER_FILES, _FILES_A_PEER = 48, 16, 4
_RANK_TASKS, _WORKER_TASKS, _CUDA_TASKS = 24, 8, 48
_LAUNCHER_TASKS = 16


@dataclass(frozen=True)
class Host:
    """What is needed of one machine; sizes in bytes.

    Attributes:
        shared_memory: batches on their way from loader processes to the ranks.
        memory: parts that are needed for sure.
        budget: that loader processes may use beyond: their stream.memory less what is counted for it.
        files: open at once in one process.
        tasks: processes and threads of all ranks.
    """

    shared_memory: int
    memory: dict[str, int]
    budget: int
    files: int
    tasks: int


def count_host(
    config: Config,
    *,
    world_size: int,
    ranks: int,
    cores: int,
    cuda: bool,
    sample_bytes: float = SAMPLE_BYTES,
    model: int = 0,
    checkpoint: int = 0,
) -> Host:
    """Count what the ranks of one machine need.

    Args:
        config: resolved.
        world_size: ranks of the run.
        ranks: of this machine.
        cores: CPU cores of this machine.
        cuda: whether the model lives on a GPU.
        sample_bytes: of a sample in its shard.
        model: bytes of a step on the CPU; nothing on the host where there is a GPU.
        checkpoint: bytes that rank 0 stages before they are written.
    """
    workers, prefetch = known(config.loader.workers), config.loader.prefetch
    batch = batch_bytes(config, world_size)
    held = ranks * (workers * prefetch + 1) * batch
    streams = ranks * max(1, workers)
    used = _stream_bytes(config, world_size, sample_bytes)
    tensors = len(config.crops.sizes) + 2
    memory = {
        "launcher and ranks": PYTHON + ranks * RANK + (ranks * CUDA if cuda else 0),
        "loader processes": ranks * ((workers + 1) * FORKED if workers else 0),
        "blocks and windows": streams * used,
        "batches": held,
        "model": ranks * model,
        "checkpoint": checkpoint,
    }
    rank_files = _RANK_FILES + _CONNECTIONS + workers * (4 + prefetch * tensors) + _FILES_A_PEER * world_size
    worker_files = _WORKER_FILES + _CONNECTIONS + prefetch * tensors
    worker_tasks = _WORKER_TASKS + config.loader.requests
    rank_tasks = _RANK_TASKS + cores // ranks + (_CUDA_TASKS if cuda else 0) + workers * worker_tasks
    return Host(
        shared_memory=held if workers else 0,
        memory={part: amount for part, amount in memory.items() if amount},
        budget=streams * (config.stream.memory - used),
        files=max(rank_files, worker_files),
        tasks=_LAUNCHER_TASKS + ranks * rank_tasks,
    )


def batch_bytes(config: Config, world_size: int) -> int:
    """Bytes of one rank's share of a batch: its crops, RGB, a byte each."""
    crops = zip(config.crops.counts, config.crops.sizes, strict=True)
    return known(config.training.batch) // world_size * sum(count * 3 * edge * edge for count, edge in crops)


def _stream_bytes(config: Config, world_size: int, sample_bytes: float) -> int:
    """Bytes of blocks and windows of one process, within stream.memory."""
    stream, loader = config.stream, config.loader
    lanes = max(1, known(stream.rows) // max(1, known(loader.workers)))
    lanes *= max(1, known(stream.columns) // world_size)
    try:
        shares = share_memory(
            stream.memory,
            lanes=lanes,
            window=stream.window,
            block=config.storage.block_bytes,
            read_ahead=loader.read_ahead,
            requests=loader.requests,
        )
    except ConfigError:  # it is refused where it is looked at
        return stream.memory
    blocks = (lanes * (shares.read_ahead + 1) + loader.requests + 1) * shares.block
    windows = min(shares.held, round(lanes * stream.window * sample_bytes))
    return min(stream.memory, blocks + windows)
