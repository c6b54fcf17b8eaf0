"""The whole plan of a run: what it takes, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from streamswav.config import Config
from streamswav.defaults import Facts, known, resolve, run_samples
from streamswav.errors import ConfigError
from streamswav.models import build_trunk
from streamswav.planning.gpus import Gpu
from streamswav.planning.memory import Memory, count_memory, last_that_fits
from streamswav.planning.rehearsal import Rehearsal, rehearse
from streamswav.planning.speed import EFFICIENCY, Flops, Speed, count_flops, estimate_speed
from streamswav.planning.traffic import (
    SAMPLE_BYTES,
    Loader,
    Network,
    Reading,
    count_loader,
    count_network,
    count_reading,
)

_MANY_SHARDS = 1_000_000
_CORES = 12
_RANDOM_STATE = 5_056
"""Bytes of torch's generator, of which a checkpoint keeps each rank's."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned.

    Attributes:
        config: as it was given.
        gpus: how many, one rank each.
        gpu: their type.
        hourly_rate: price of one GPU for an hour.
        sample_bytes: of a sample in its shard; None: by the listing, else an assumption.
        efficiency: share of the roofline that is reached.
        sizes: (bytes, passes) of every shard, where they were listed.
        samples: of one pass and of all passes, where producers counted.
    """

    config: Config
    gpus: int
    gpu: Gpu
    hourly_rate: float | None = None
    sample_bytes: float | None = None
    efficiency: float = EFFICIENCY
    sizes: Sequence[tuple[int, int]] = ()
    samples: tuple[int | None, int | None] = (None, None)


@dataclass(frozen=True)
class Fit:
    """Whether it fits, and where it would.

    Attributes:
        available: bytes of the GPU.
        share: of them that a step takes.
        fits: whether that is all right.
        world_sizes: numbers of GPUs that divide the grid's columns: the same batches in the same order.
        fitting_from: the least of them on which the batch fits, extrapolated; None where none does.
    """

    available: int
    share: float
    fits: bool
    world_sizes: tuple[int, ...]
    fitting_from: int | None


@dataclass(frozen=True)
class Duration:
    """The whole run.

    Attributes:
        images: of all passes, or as many as are asked for; None where the samples are not known.
        steps: of them.
        hours: at the estimated speed.
        hours_per_million_images: likewise; known without the samples.
        published_hours: at the paper's speed, on V100.
        gpu_hours: hours times GPUs.
        price: of them at the hourly rate.
        price_per_million_images: likewise.
    """

    images: int | None
    steps: int | None
    hours: float | None
    hours_per_million_images: float
    published_hours: float | None
    gpu_hours: float | None
    price: float | None
    price_per_million_images: float | None


@dataclass(frozen=True)
class Checkpoints:
    """What is saved.

    Attributes:
        bytes: of one checkpoint: weights, optimizer state, the queues of all ranks.
        kept: newest ones, and those kept for good over the run; the latter only where the images are known.
        total_bytes: of all that are kept at the end.
    """

    bytes: int
    kept: int
    total_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that `streamswav plan` says; sizes are in bytes, times in seconds or hours as named."""

    gpu: str
    gpus: int
    batch: int
    local_batch: int
    precision: str
    parameters: dict[str, int]
    flops: Flops
    memory: Memory
    fit: Fit
    speed: Speed
    loader: Loader
    network: Network
    duration: Duration
    reading: Reading | None
    checkpoints: Checkpoints
    assumptions: tuple[str, ...]


def make_plan(request: Request) -> Plan:
    """Plan a run without a GPU and without memory for it.

    Raises:
        ConfigError: the configuration cannot work on so many GPUs.
    """
    config, world_size, gpu = _resolve(request), request.gpus, request.gpu
    batch = known(config.training.batch)
    local = batch // world_size
    rehearsal = rehearse(config, world_size=world_size, local=local)
    precision = config.training.precision
    speed = estimate_speed(
        rehearsal.ledger,
        gpu,
        precision=precision,
        local=local,
        efficiency=request.efficiency,
        paper=(config.model.trunk, config.model.width) == ("resnet50", 1.0),
    )
    sample_bytes, total = _sample_bytes(request), _run_samples(config, request)
    memory = count_memory(rehearsal, config, world_size=world_size, local=local)
    duration = _duration(config, request, speed, total)
    network = count_network(
        rehearsal,
        config,
        world_size=world_size,
        sample_bytes=sample_bytes,
        step_seconds=speed.step_seconds,
    )

    return Plan(
        gpu=gpu.name,
        gpus=world_size,
        batch=batch,
        local_batch=local,
        precision=precision,
        parameters={
            "trunk": rehearsal.trunk,
            "head": rehearsal.head,
            "prototypes": rehearsal.prototypes,
            "total": rehearsal.parameters,
        },
        flops=count_flops(rehearsal.ledger, local=local),
        memory=memory,
        fit=_fit(config, request, memory, local),
        speed=speed,
        loader=count_loader(config, speed.images_per_second),
        network=network,
        duration=duration,
        reading=count_reading(config, samples=total, sample_bytes=sample_bytes, sizes=request.sizes),
        checkpoints=_checkpoints(config, rehearsal, world_size, duration.images),
        assumptions=tuple(_assumptions(config, request, sample_bytes, total)),
    )


def _resolve(request: Request) -> Config:
    """Choose what was left open as the run would on these GPUs.

    The global batch is chosen by the paper's images a GPU, not by trial: what is planned shows what fits.
    """
    if request.gpus < 1:
        raise ConfigError("--gpus", "must be 1 or more", value=request.gpus)
    facts = Facts(
        world_size=request.gpus,
        cores=_CORES,
        cuda=True,
        bfloat16=request.gpu.bfloat16,
        shards=len(request.sizes) or _MANY_SHARDS,
        samples=request.samples[0],
        run_samples=request.samples[1],
        trunk_parameters=trunk_parameters(request.config),
    )
    return resolve(request.config, facts)[0]


def images_bound(config: Config, gpu: Gpu, *, world_size: int) -> float:
    """Return the images a second that the arithmetic of so many GPUs allows at its peak: an MFU of 1.

    Args:
        config: resolved.
        gpu: of each rank.
        world_size: ranks that share the batch.
    """
    local = known(config.training.batch) // world_size
    with torch.random.fork_rng(devices=[]):
        flops = count_flops(rehearse(config, world_size=world_size).ledger, local=local)
    return world_size * gpu.peak(config.training.precision or "float32") / flops.image


def trunk_parameters(config: Config) -> int:
    """Count the parameters of the trunk without building it.

    Raises:
        ConfigError: as `build_trunk`.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_trunk(config.model).parameters())


def _fit(config: Config, request: Request, memory: Memory, local: int) -> Fit:
    """Find the fewest GPUs: memory is a line in the images of a GPU, through two of them."""
    gpu, batch = request.gpu, known(config.training.batch)
    worlds = [each for each in range(1, batch + 1) if known(config.stream.columns) % each == 0]
    other = local // 2 if local // 2 >= max(2, config.training.micro_batches) else 2 * local
    rehearsal = rehearse(config, world_size=request.gpus, local=other)
    second = count_memory(rehearsal, config, world_size=request.gpus, local=other)
    slope = (memory.total - second.total) / (local - other)

    def share(images: int) -> float:
        return (memory.total + slope * (images - local)) / gpu.memory

    last = last_that_fits([batch // each for each in reversed(worlds)], share, 1.0)
    return Fit(
        available=gpu.memory,
        share=memory.total / gpu.memory,
        fits=memory.total <= gpu.memory,
        world_sizes=tuple(worlds),
        fitting_from=worlds[-1 - last] if last >= 0 else None,
    )


def _sample_bytes(request: Request) -> float:
    if request.sample_bytes is not None:
        return request.sample_bytes
    size, samples = sum(size for size, _ in request.sizes), request.samples[0]
    return size / samples if size and samples else SAMPLE_BYTES


def _run_samples(config: Config, request: Request) -> int | None:
    """Samples that the run reads: of all passes, or as many as are asked for."""
    whole = run_samples(config, request.samples[1])
    images = config.training.images
    return min(whole, images) if whole and images else whole or images


def _duration(config: Config, request: Request, speed: Speed, images: int | None) -> Duration:
    million = 1e6 / (speed.images_per_second * request.gpus) / 3600
    batch, rate = known(config.training.batch), request.hourly_rate
    steps = hours = published = gpu_hours = None
    if images is not None:
        steps = images // batch
        hours = million * images / 1e6
        gpu_hours = hours * request.gpus
        if speed.published_images_per_second:
            published = images / (speed.published_images_per_second * request.gpus) / 3600
    return Duration(
        images=images,
        steps=steps,
        hours=hours,
        hours_per_million_images=million,
        published_hours=published,
        gpu_hours=gpu_hours,
        price=None if rate is None or gpu_hours is None else rate * gpu_hours,
        price_per_million_images=None if rate is None else rate * million * request.gpus,
    )


def _checkpoints(config: Config, rehearsal: Rehearsal, world_size: int, images: int | None) -> Checkpoints:
    weights = rehearsal.parameters * 4 + rehearsal.buffers
    by_rank = (rehearsal.queue + _RANDOM_STATE) * world_size
    size = weights + rehearsal.optimizer + by_rank
    every = config.checkpoint.keep_every_images
    kept = config.checkpoint.keep + (images // every if images and every else 0)
    return Checkpoints(size, kept, size * kept)


def _assumptions(config: Config, request: Request, sample_bytes: float, images: int | None) -> Iterator[str]:
    """Say what was not known."""
    if request.sample_bytes is None and sample_bytes == SAMPLE_BYTES:
        yield f"{SAMPLE_BYTES:,} bytes a sample (--sample-bytes, or --list)"
    if images is None:
        yield "the number of samples is not known: no hours, price or requests (--samples, or --list)"
    yield (
        f"{request.efficiency:.0%} of the roofline, about what a tuned ResNet-50 reaches (--efficiency); "
        "loader, network and storage keep up"
    )
    yield "context, workspaces, NCCL and allocator are allowances; nothing of this was yet measured on a GPU"
    if not request.gpu.bfloat16 and config.training.precision == "bfloat16":
        yield f"{request.gpu.name} has no bfloat16: it is emulated, slowly; use float16"
    if config.training.precision == "float32":
        yield "float32: convolutions in TF32 where the GPU has it, as torch does"
