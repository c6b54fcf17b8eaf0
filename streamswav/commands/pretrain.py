"""`streamswav pretrain`: put a run together from its configuration, and run it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from streamswav import __version__
from streamswav.config import Config, dump_config, parse_config
from streamswav.crops import Augment, MultiCrop
from streamswav.defaults import Facts, resolve
from streamswav.errors import ConfigError, DrainedError, ManifestError, PositionError, StreamswavError
from streamswav.models import SwAVNetwork, build_network, build_trunk
from streamswav.stream.manifest import Manifest, Shard, list_manifest
from streamswav.stream.plan import Grid
from streamswav.stream.position import Position
from streamswav.stream.samples import ShardReader
from streamswav.stream.store import Store, join, redact
from streamswav.swav import FeatureQueue, SwAVLoss, usable_length
from streamswav.telemetry.exporter import serve_metrics
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Reporter
from streamswav.training.checkpoint import CheckpointFolder, find_checkpoint
from streamswav.training.distributed import Ranks, join_ranks, local_world_size
from streamswav.training.feed import Feed, FeedSettings
from streamswav.training.learner import Learner
from streamswav.training.monitor import Monitor
from streamswav.training.optim import build_optimizer
from streamswav.training.pace import make_pace
from streamswav.training.saver import Restored, Saver, load_into
from streamswav.training.trainer import Trainer

_LEADER_FIRST_SECONDS = 2.0

Number = TypeVar("Number", int, float)

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Run:
    """What all parts of a run share once it has started."""

    config: Config
    manifest: Manifest
    ranks: Ranks
    store: Store
    reporter: Reporter
    metrics: Metrics


def pretrain(config: Config) -> dict[str, Any]:
    """Run, or go on with, the pretraining that the configuration describes.

    Returns:
        The summary that is written beside the checkpoints.

    Raises:
        DrainedError: stopped by a signal; everything is saved.
        StreamswavError: as the configuration, the data or the store deserve.
    """
    _refuse_incomplete(config)
    metrics = Metrics()
    with join_ranks(config.training.device) as ranks, ExitStack() as stack:
        try:
            section = config.telemetry
            ranks.lead(
                lambda: stack.enter_context(serve_metrics(metrics, port=section.port, bind=section.bind))
            )
            reporter = stack.enter_context(closing(Reporter(silent=not ranks.leads)))
            return _train(_prepare(config, ranks, metrics, reporter))
        except StreamswavError as error:
            metrics.set_state("draining" if isinstance(error, DrainedError) else "failed")
            if ranks.leads:
                raise
            # All ranks have the same error, since they agree on every one. Rank 0 tells it, in time: a
            # launcher ends the others as soon as one has gone.
            time.sleep(_LEADER_FIRST_SECONDS)
            raise SystemExit(error.exit_code) from None


def _refuse_incomplete(config: Config) -> None:
    if not config.stream.urls:
        raise ConfigError("stream.urls", "say where the shards are, as --stream.urls s3://bucket/shards/")
    if not config.run.directory:
        raise ConfigError("run.directory", "say where the run is kept, as --run.directory runs/first")


def _prepare(config: Config, ranks: Ranks, metrics: Metrics, reporter: Reporter) -> Run:
    """List the shards, choose what was left open, and say so."""
    _set_up_torch(config, ranks)
    store = Store(config.storage)
    begun = ranks.lead(lambda: _read_begun(config, store))
    manifest = ranks.lead(lambda: _freeze_manifest(config, store, reporter, begun=begun is not None))
    if begun:
        _refuse_other_grid(_grid(begun), config)
    cuda = ranks.device.type == "cuda"
    facts = Facts(
        world_size=ranks.world_size,
        cores=min(ranks.gather(_cores())),
        cuda=cuda,
        bfloat16=all(ranks.gather(cuda and torch.cuda.is_bf16_supported(including_emulation=False))),
        shards=len(manifest.shards),
        samples=manifest.samples,
        trunk_parameters=_trunk_parameters(config),
        begun=begun,
    )
    resolved, choices = resolve(config, facts)
    for choice in choices:
        reporter.event(
            "default", f"{choice.key} = {choice.value}  ({choice.reason})", key=choice.key, value=choice.value
        )
    batch = _known(resolved.training.batch)
    if manifest.samples is not None and manifest.samples < batch:
        raise ManifestError(
            f"{redact(config.stream.urls[0])}: {manifest.samples} samples are fewer than one global batch "
            f"(training.batch = {batch}); lower it or add data"
        )
    return Run(resolved, manifest, ranks, store, reporter, metrics)


def _set_up_torch(config: Config, ranks: Ranks) -> None:
    torch.set_num_threads(config.training.threads or _cores())
    torch.manual_seed(config.stream.seed)
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def _freeze_manifest(config: Config, store: Store, reporter: Reporter, *, begun: bool) -> Manifest:
    """List the shards; a run that has begun keeps to the list it began with.

    Raises:
        PositionError: shards of the run's list are gone or were changed.
    """
    listed = list_manifest(config.stream.urls, store)
    place = join(config.run.directory, "manifest.json")
    if not begun or not store.exists(place):
        store.write(place, json.dumps(listed.to_json()).encode())
        return listed
    frozen = Manifest.from_json(json.loads(store.read(place)))
    there = {shard.key: shard for shard in listed.shards}
    for shard in frozen.shards:
        difference = _differs(shard, there.get(shard.key))
        if difference:
            raise PositionError(
                f"{redact(place)}: shard {shard.key} of this run {difference} below stream.urls; "
                "bring it back, or choose another run.directory for other data"
            )
    new = len(listed.shards) - len(frozen.shards)
    if new:
        reporter.event("new_shards", f"{new} shards came after the run began: they are left for another run")
    # Content may have moved as a whole, so today's URLs and versions hold for the shards of then.
    return Manifest(tuple(there[shard.key] for shard in frozen.shards), frozen.samples)


def _differs(frozen: Shard, found: Shard | None) -> str:
    """Say how a shard is no longer the run's; its version tells only where it has not moved."""
    if found is None:
        return "is gone"
    if found.size != frozen.size:
        return "has another size"
    return "was replaced" if redact(found.url) == frozen.url and found.version != frozen.version else ""


def _cores() -> int:
    """The CPU cores that a rank of this machine can use."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def _trunk_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_trunk(config.model).parameters())


def _read_begun(config: Config, store: Store) -> Config | None:
    """Read what was chosen when the run began; before its first checkpoint everything is still open."""
    place = join(config.run.directory, "config.yaml")
    if not _checkpoints(config, store).begun() or not store.exists(place):
        return None
    return parse_config(yaml.safe_load(store.read(place)))


def _checkpoints(
    config: Config, store: Store, warn: Callable[[str], None] = lambda _: None
) -> CheckpointFolder:
    return CheckpointFolder(join(config.run.directory, "checkpoints"), store, warn=warn)


def _train(run: Run) -> dict[str, Any]:
    """Go on from the newest checkpoint, or begin; the summary is rank 0's, empty on others."""
    config, ranks, reporter = run.config, run.ranks, run.reporter
    folder = _checkpoints(config, run.store, lambda text: reporter.event("warning", text))
    saver = Saver(folder, run.store, config, ranks)
    restored = saver.restore()
    monitor = Monitor(
        run.metrics,
        reporter,
        ranks,
        prototypes=_known(config.swav.prototypes),
        log_seconds=config.telemetry.log_seconds,
    )
    monitor.describe(run.manifest, _about(config, ranks))
    run.metrics.checkpoint_interval.set(60 * (config.checkpoint.minutes or math.inf))
    with _drain_on_signals() as drain:
        trainer, feed = _build_trainer(run, saver, monitor, restored, drain)
        if trainer.done:
            reporter.event("done", f"{config.run.directory}: this run is done ({feed.trained:,} images)")
        else:
            place = join(config.run.directory, "config.yaml")
            ranks.lead(lambda: run.store.write(place, dump_config(config).encode()))
            monitor.begin(images=feed.trained, loss_first=restored.loss_first if restored else None)
            trainer.train()
    run.metrics.set_state("done")
    summary = ranks.lead(lambda: _summarise(run, trainer, feed, monitor, saver))
    return summary if ranks.leads else {}


def _build_trainer(
    run: Run, saver: Saver, monitor: Monitor, restored: Restored | None, drain: Callable[[], bool]
) -> tuple[Trainer, Feed]:
    config, ranks = run.config, run.ranks
    learner = build_learner(config, ranks)
    position = _start_position(run, restored)
    if restored:
        load_into(learner, restored, ranks, batch=_known(config.training.batch))
        run.reporter.event(
            "resumed",
            f"going on from {restored.checkpoint.url} ({position.trained:,} images)",
            step=restored.step,
        )
    feed = Feed(
        run.manifest,
        position,
        settings=FeedSettings(
            passes=config.stream.passes,
            workers=_known(config.loader.workers),
            prefetch=config.loader.prefetch,
            skip_ratio=config.stream.skip_ratio,
            skip_probation=config.stream.skip_probation,
        ),
        reader=ShardReader(run.manifest, config.storage, read_ahead=config.loader.read_ahead),
        crop=MultiCrop(config.crops, seed=config.stream.seed),
        ranks=ranks,
        drain=drain,
        wants_save=lambda: saver.due(feed.trained + position.grid.batch),
        wants_log=monitor.log_due,
        on_quarantined=monitor.quarantined,
    )
    trainer = Trainer(
        learner=learner,
        feed=feed,
        augment=Augment(config.crops),
        pace=make_pace(config, run.manifest.size),
        saver=saver,
        monitor=monitor,
        step=restored.step if restored else 0,
        images_limit=config.training.images,
        device=ranks.device,
    )
    return trainer, feed


def build_learner(config: Config, ranks: Ranks) -> Learner:
    """Build network, objective, queue and optimizer of a resolved configuration on this rank's device.

    Raises:
        ConfigError: what the configuration asks for does not exist or does not fit.
    """
    swav, training = config.swav, config.training
    batch, local = _known(training.batch), _known(training.batch) // ranks.world_size
    network = build_network(config.model, prototypes=_known(swav.prototypes))
    network = network.to(memory_format=torch.channels_last).to(ranks.device)
    length = usable_length(_known(swav.queue_length), batch) // ranks.world_size
    queue = None
    if length:
        queue = FeatureQueue(length=length, dim=config.model.embedding, crops=len(swav.assigned_crops))
        queue = queue.to(ranks.device)
    optimizer = build_optimizer(config.optimizer, network.parameters())
    wrapped = _distribute(network, config, ranks)
    precision = training.precision
    learner = Learner(
        wrapped,
        SwAVLoss(
            epsilon=_known(swav.epsilon),
            iterations=_known(swav.iterations),
            temperature=swav.temperature,
            assigned=tuple(swav.assigned_crops),
            hard_codes=swav.hard_codes,
            group=ranks.group,
        ),
        optimizer,
        crops=sum(config.crops.counts),
        queue=queue,
        scaler=torch.amp.GradScaler("cuda") if precision == "float16" else None,
        autocast=_AUTOCAST[precision],
        learn_prototypes=swav.learn_prototypes,
    )
    if ranks.world_size > 1:
        sizes = zip(config.crops.counts, config.crops.sizes, strict=True)
        learner.rehearse([torch.zeros(n * local, 3, size, size, device=ranks.device) for n, size in sizes])
    return learner


def _distribute(network: SwAVNetwork, config: Config, ranks: Ranks) -> SwAVNetwork | DistributedDataParallel:
    """Wrap for several ranks. SyncBatchNorm exists on GPUs alone; on the CPU statistics are each rank's."""
    if ranks.world_size == 1:
        return network
    share = config.training.sync_batch_norm
    if ranks.device.type == "cuda" and share != 1:
        group = ranks.group
        if share and share < ranks.world_size:
            group = torch.distributed.new_subgroups(share)[0]
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network, group)  # type: ignore[no-untyped-call]  # torch
    return DistributedDataParallel(
        network,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        process_group=ranks.group,
        gradient_as_bucket_view=True,
    )


def _start_position(run: Run, restored: Restored | None) -> Position:
    """The restored position, or the beginning.

    Raises:
        PositionError: the shards, the grid or the seed of the configuration are not the run's.
    """
    grid = _grid(run.config)
    if restored is None:
        return Position(run.manifest.digest, grid, run.config.stream.seed)
    _refuse_other_grid(restored.position.grid, run.config)
    restored.position.plan(run.manifest)
    return _reopened(restored.position, run.config)


def _reopened(position: Position, config: Config) -> Position:
    """A stream that was at its end goes on where more passes are asked for now."""
    return replace(position, finished=position.finished and position.turn >= config.stream.passes)


def _grid(config: Config) -> Grid:
    stream = config.stream
    return Grid(_known(config.training.batch), _known(stream.columns), _known(stream.rows), stream.window)


def _refuse_other_grid(begun: Grid, config: Config) -> None:
    """Compare the grid that a run began with to what is configured; what is left open is no difference.

    Raises:
        PositionError: naming the first key that differs.
    """
    stream = config.stream
    now = {
        "training.batch": (begun.batch, config.training.batch),
        "stream.columns": (begun.columns, stream.columns),
        "stream.rows": (begun.rows, stream.rows),
        "stream.window": (begun.window, stream.window),
    }
    for key, (old, new) in now.items():
        if new is not None and new != old:
            raise PositionError(
                f"the run in {redact(config.run.directory)} began with {key} = {old}, now it is {new}: "
                "set it back, or choose another run.directory"
            )


@contextmanager
def _drain_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask for a drain; a second SIGINT ends at once."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _about(config: Config, ranks: Ranks) -> dict[str, str]:
    digest = hashlib.blake2b(dump_config(config).encode(), digest_size=6).hexdigest()
    return {"version": __version__, "world_size": str(ranks.world_size), "config_hash": digest}


def _summarise(run: Run, trainer: Trainer, feed: Feed, monitor: Monitor, saver: Saver) -> dict[str, Any]:
    """Write what the run came to; where this process trained nothing, what was written before stands."""
    config, position = run.config, feed.position
    place = join(config.run.directory, "summary.json")
    if monitor.images_per_second == 0 and run.store.exists(place):
        before: dict[str, Any] = json.loads(run.store.read(place))
        return before
    samples, loss = run.manifest.samples, monitor.loss_last
    left = sum(len(piece.named() or ()) for piece in position.carried) if position.finished else None
    summary = {
        "images": position.trained,
        "steps": trainer.step,
        "images_per_second": round(monitor.images_per_second, 1),
        "seed": config.stream.seed,
        "loss_first": monitor.loss_first,
        "loss_last": loss if math.isfinite(loss) else None,
        "ln_prototypes": math.log(_known(config.swav.prototypes)),
        "stream": {
            "manifest": None if samples is None else samples * config.stream.passes,
            "trained": position.trained,
            "quarantined": sum(position.quarantined.values()),
            "damages": len(position.damages),
            "left": left,
            "passes": config.stream.passes,
        },
        "checkpoint": saver.last.url if saver.last else None,
        "shards_url": redact(config.stream.urls[0]),
    }
    run.store.write(place, json.dumps(summary, indent=1).encode())
    return summary


def _known(value: Number | None) -> Number:
    assert value is not None, "resolved at start"
    return value


def cooldown(config: Config, *, images: int | None) -> dict[str, Any]:
    """Go on with a run of constant rate for `images` more, over which the rate falls to its end.

    Args:
        config: the run's configuration.
        images: default: a tenth of those seen.

    Raises:
        CheckpointError: there is nothing to go on from.
        StreamswavError: as `pretrain`.
    """
    _refuse_incomplete(config)
    checkpoint, files = find_checkpoint(config.run.directory, Store(config.storage))
    position = Position.from_json(json.loads(files["position.json"]))
    if _reopened(position, config).finished:
        reason = "the stream is at its end; a cool-down needs images: ask for one pass more"
        raise ConfigError("stream.passes", reason, value=config.stream.passes)
    saved = parse_config(yaml.safe_load(files["config.yaml"]))
    # A cool-down that was interrupted goes on to the end it had.
    if saved.optimizer.cooldown_images and saved.training.images:
        return pretrain(_with_end(config, saved.optimizer.cooldown_images, saved.training.images))
    length = images or position.trained // 10
    return pretrain(_with_end(config, length, checkpoint.images + length))


def _with_end(config: Config, length: int, end: int) -> Config:
    values = config.model_dump()
    values["optimizer"] |= {"schedule": "constant", "cooldown_images": length}
    values["training"]["images"] = end
    return parse_config(values)
