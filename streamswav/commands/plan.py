"""`streamswav plan`: what a run will take, before anyone pays for a node."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict

from streamswav.config import Config
from streamswav.errors import ConfigError
from streamswav.planning import GPUS, Plan, Request, find_gpu, make_plan
from streamswav.planning.speed import EFFICIENCY
from streamswav.stream.manifest import list_manifest
from streamswav.stream.store import Store

_GPU = "A100-80GB"
_SAID = {
    "weights": "weights and statistics",
    "gradients": "gradients (DDP buckets)",
    "optimizer": "optimizer state",
    "activations": "activations for backward",
    "codes": "scores, codes, loss",
    "queue": "queue",
    "crops": "crops",
    "temporaries": "temporaries, recomputed",
    "context": "CUDA context (allowance)",
    "workspaces": "cuDNN workspaces (allowance)",
    "communication": "NCCL buffers (allowance)",
    "fragments": "allocator, 5% (allowance)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `plan` takes beside the configuration."""
    parser.usage = "streamswav plan [CONFIG.yaml] [options] [--section.key value]..."
    parser.epilog = (
        "Keys of the configuration are set as for pretrain; what is left open is chosen by the same rules. "
        f"GPU types: {', '.join(GPUS)}. Nothing is read from the network but with --list."
    )
    add = parser.add_argument
    add("--gpus", type=int, default=8, metavar="N", help="GPUs, a rank each (default: 8)")
    add("--gpu", default=_GPU, metavar="TYPE", help=f"their type (default: {_GPU})")
    add("--hourly-rate", type=float, metavar="X", help="price of one GPU for an hour, in any currency")
    add("--samples", type=float, metavar="N", help="samples in one pass, as --stream.samples")
    add("--sample-bytes", type=float, metavar="B", help="mean size of a sample in its shard")
    add(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        metavar="E",
        help=f"share of the roofline that is reached, 0 to 1 (default: {EFFICIENCY})",
    )
    add("--list", action="store_true", help="list stream.urls, for the size of the data")
    add("--json", action="store_true", help="print JSON")


def run_plan(arguments: argparse.Namespace, config: Config) -> None:
    """Print the plan of a configuration.

    Raises:
        ConfigError: an argument, or a configuration, that cannot work.
        StorageError: with `--list`, as the listing.
    """
    sizes, samples = _list(config) if arguments.list else ([], (None, None))
    plan = make_plan(
        Request(
            config=config,
            gpus=arguments.gpus,
            gpu=find_gpu(arguments.gpu),
            hourly_rate=arguments.hourly_rate,
            sample_bytes=arguments.sample_bytes,
            efficiency=arguments.efficiency,
            sizes=sizes,
            samples=samples,
        )
    )
    text = json.dumps(asdict(plan), indent=1) if arguments.json else "\n".join(describe(plan))
    sys.stdout.write(text + "\n")


def describe(plan: Plan) -> Iterator[str]:
    """Give the plan as lines for people."""
    parameters = plan.parameters
    shared = f"batch {plan.batch:,}, {plan.local_batch} a GPU, {plan.precision}"
    yield f"plan for {plan.gpus} x {plan.gpu}: {shared}"
    yield (
        f"parameters   {parameters['total']:,}: trunk {parameters['trunk']:,}, head {parameters['head']:,}, "
        f"prototypes {parameters['prototypes']:,}"
    )
    flops = plan.flops
    yield (
        f"a step       {_scaled(flops.forward + flops.backward + flops.objective)}FLOP a GPU: forward "
        f"{_scaled(flops.forward)}, backward {_scaled(flops.backward)}; {_scaled(flops.image)}FLOP an image"
    )
    yield from _describe_memory(plan)
    yield from _describe_speed(plan)
    yield from _describe_run(plan)
    yield from _describe_resuming(plan)
    yield from (f"assumed: {each}" for each in plan.assumptions)


def _describe_memory(plan: Plan) -> Iterator[str]:
    memory, fit = plan.memory, plan.fit
    yield f"memory       {_size(memory.total)} of {_size(fit.available)} ({fit.share:.0%}): {_verdict(plan)}"
    for part, size in memory.parts.items():
        if size:
            yield f"  {_SAID[part]:<30}{_size(size):>10}"
    yield (
        f"  most is held in {memory.phase}; saved for backward {_size(memory.saved)}, "
        f"codes at most {_size(memory.codes)}; {_size(memory.augmenting)} while crops are augmented, before"
    )


def _verdict(plan: Plan) -> str:
    fit = plan.fit
    if fit.fits:
        return "fits" if fit.share <= 0.9 else "fits, but only just"
    if fit.fitting_from is None:
        return f"does not fit, nor on {fit.world_sizes[-1]} GPUs; try training.micro_batches, or larger GPUs"
    return f"does not fit; take {fit.fitting_from} GPUs, training.micro_batches or activation_checkpointing"


def _describe_speed(plan: Plan) -> Iterator[str]:
    speed, loader, network = plan.speed, plan.loader, plan.network
    by = "arithmetic" if speed.arithmetic_share > 0.5 else "memory bandwidth"
    yield (
        f"speed        {_rate(speed.images_per_second)} images/s a GPU, {speed.step_seconds:.3f} s a step "
        f"({speed.efficiency:.0%} of the roofline, limited by {by}; MFU {speed.mfu:.0%})"
    )
    if speed.published_images_per_second:
        yield f"  at the paper's speed: {_rate(speed.published_images_per_second)} images/s a V100"
    yield (
        f"loader       {_rate(loader.images_per_second)} images/s a GPU: {loader.cores} CPU cores of "
        f"{loader.images_per_core:g} images/s, {loader.cores_if_cpu_augmented} if the CPU augmented too; "
        f"loader.workers {loader.workers}"
    )
    yield (
        f"network      a step and GPU: {_size(network.storage)} from storage, {_size(network.gradients)} "
        f"gradients, {_size(network.sinkhorn)} Sinkhorn, {_size(network.batch_norm)} SyncBatchNorm; "
        f"{_size(network.bytes_per_second)}/s"
    )


def _describe_run(plan: Plan) -> Iterator[str]:
    run, reading = plan.duration, plan.reading
    if run.images is None or run.hours is None:
        yield f"run          {run.hours_per_million_images:.2f} h a million images{_price(plan)}"
    else:
        yield f"run          {run.images:,} images, {run.steps:,} steps, {run.hours:.1f} h{_price(plan)}"
    if run.published_hours:
        yield f"  at the paper's speed: {run.published_hours:.1f} h"
    if reading:
        found = "as listed" if reading.listed else "about"
        yield f"bucket       {found} {_size(reading.bytes)}, {reading.requests:,} GET requests"


def _price(plan: Plan) -> str:
    run = plan.duration
    if run.price is not None and run.gpu_hours is not None:
        return f", {run.gpu_hours:,.0f} GPU hours: {run.price:,.2f} at the hourly rate"
    if run.price_per_million_images is not None:
        return f": {run.price_per_million_images:,.2f} at the hourly rate"
    return ""


def _describe_resuming(plan: Plan) -> Iterator[str]:
    saved, fit = plan.checkpoints, plan.fit
    yield f"checkpoint   {_size(saved.bytes)}; {saved.kept} are kept at the end, {_size(saved.total_bytes)}"
    worlds = ", ".join(map(str, fit.world_sizes))
    least = f", from {fit.fitting_from} on in memory" if fit.fitting_from else ", none of them in memory"
    yield f"resumes on   {worlds} ranks with the same batches{least}"
    yield f"  on any other number up to {plan.batch:,} what is left is dealt again, still once each"


def refuse_nonsense(arguments: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        ConfigError: naming the argument.
    """
    for name in ("gpus", "hourly_rate", "sample_bytes", "samples"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name.replace('_', '-')}", "must be positive", value=value)
    if not 0 < arguments.efficiency <= 1:
        raise ConfigError("--efficiency", "must be above 0 and at most 1", value=arguments.efficiency)
    if arguments.list and arguments.samples and arguments.sample_bytes:
        raise ConfigError("--list", "is not needed with both --samples and --sample-bytes")


def _list(config: Config) -> tuple[list[tuple[int, int]], tuple[int | None, int | None]]:
    if not config.stream.urls:
        raise ConfigError("--list", "needs stream.urls, as --stream.urls s3://bucket/shards/")
    manifest = list_manifest(config.stream.urls, Store(config.storage))
    passes = config.stream.passes_by_url
    sizes = [(shard.size, passes[shard.source]) for shard in manifest.shards]
    return sizes, (manifest.samples, manifest.total(passes))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _size(count: float) -> str:
    """Bytes in powers of a thousand, as the paper's and as the network's."""
    return f"{_scaled(count)}B"


def _scaled(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if not unit else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} P"
