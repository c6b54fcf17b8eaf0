"""`streamswav pretrain`: put a run together from its configuration, and run it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml

from streamswav import __version__
from streamswav.commands.run_folder import (
    LEFT_FILE,
    MANIFEST_FILE,
    checkpoints_of,
    freeze_manifest,
    read_begun,
    refuse_other_grid,
)
from streamswav.config import Config, StreamSection, dump_config, parse_config
from streamswav.crops import Augment, MultiCrop, image_size
from streamswav.defaults import Facts, resolve, run_samples
from streamswav.drain import Drain
from streamswav.errors import ConfigError, DrainedError, ManifestError, PositionError, StreamswavError
from streamswav.models import build_trunk
from streamswav.stream.account import list_left
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import OUTCOMES
from streamswav.stream.plan import Grid, fit_grid
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.select import Selection, load_selection
from streamswav.stream.store import Store, join, redact
from streamswav.telemetry.exporter import serve_metrics
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Reporter
from streamswav.training.build import build_learner, known
from streamswav.training.checkpoint import find_checkpoint
from streamswav.training.distributed import Ranks, join_ranks, local_world_size
from streamswav.training.feed import Feed, FeedSettings, Hooks
from streamswav.training.growth import Growth
from streamswav.training.monitor import Monitor
from streamswav.training.pace import make_pace
from streamswav.training.saver import Restored, Saver, load_into, without_secrets
from streamswav.training.trainer import Trainer

_LEADER_FIRST_SECONDS = 2.0


@dataclass(frozen=True)
class Run:
    """What all parts of a run share once it has started."""

    config: Config
    manifest: Manifest
    ranks: Ranks
    store: Store
    reporter: Reporter
    metrics: Metrics


def pretrain(config: Config, drain: Drain) -> dict[str, Any]:
    """Run, or go on with, the pretraining that the configuration describes.

    Args:
        config: as it was given.
        drain: whether to stop; from the first step on a stop saves.

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
            return _train(_prepare(config, ranks, metrics, reporter), drain)
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
    begun = ranks.lead(lambda: read_begun(config, store))
    manifest = ranks.lead(lambda: freeze_manifest(config, store, reporter, begun=begun is not None))
    if begun:
        refuse_other_grid(_grid(begun), config)
    cuda = ranks.device.type == "cuda"
    facts = Facts(
        world_size=ranks.world_size,
        cores=min(ranks.gather(_cores())),
        cuda=cuda,
        bfloat16=all(ranks.gather(cuda and torch.cuda.is_bf16_supported(including_emulation=False))),
        shards=len(manifest.shards),
        samples=manifest.samples,
        run_samples=manifest.total(config.stream.passes_by_url),
        trunk_parameters=_trunk_parameters(config),
        begun=begun,
    )
    resolved, choices = resolve(config, facts)
    for choice in choices:
        reporter.event(
            "default", f"{choice.key} = {choice.value}  ({choice.reason})", key=choice.key, value=choice.value
        )
    batch = known(resolved.training.batch)
    if manifest.samples is not None and manifest.samples < batch and not resolved.stream.follow:
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


def _cores() -> int:
    """The CPU cores that a rank of this machine can use."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def _trunk_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_trunk(config.model).parameters())


def _train(run: Run, drain: Drain) -> dict[str, Any]:
    """Go on from the newest checkpoint, or begin; the summary is rank 0's, empty on others."""
    config, ranks, reporter = run.config, run.ranks, run.reporter
    folder = checkpoints_of(config, run.store, lambda text: reporter.event("warning", text))
    saver = Saver(folder, run.store, config, ranks)
    restored = saver.restore()
    monitor = Monitor(
        run.metrics,
        reporter,
        ranks,
        prototypes=known(config.swav.prototypes),
        log_seconds=config.telemetry.log_seconds,
    )
    monitor.describe(run.manifest, _about(config, ranks))
    run.metrics.checkpoint_interval.set(60 * (config.checkpoint.minutes or math.inf))
    trainer, feed = _build_trainer(run, saver, monitor, restored, drain)
    loss_first = restored.loss_first if restored else None
    del restored  # it holds a model and an optimizer
    if trainer.done:
        reporter.event("done", f"{config.run.directory}: this run is done ({feed.trained:,} images)")
    else:
        place = join(config.run.directory, "config.yaml")
        ranks.lead(lambda: run.store.write(place, dump_config(without_secrets(config)).encode()))
        drain.patient = True
        monitor.begin(images=feed.trained, loss_first=loss_first)
        trainer.train()
    run.metrics.set_state("done")
    summary = ranks.lead(lambda: _summarise(run, trainer, feed, monitor, saver))
    return summary if ranks.leads else {}


def _build_trainer(
    run: Run, saver: Saver, monitor: Monitor, restored: Restored | None, drain: Drain
) -> tuple[Trainer, Feed]:
    ranks, select = run.ranks, _load_selection(run)
    position = _start_position(run, restored)
    config = _on_grid(run.config, position.grid)
    learner = build_learner(config, ranks)
    if restored:
        load_into(learner, restored, ranks, batch=position.grid.batch)
        run.reporter.event(
            "resumed",
            f"going on from {restored.checkpoint.url} ({position.trained:,} images)",
            step=restored.step,
        )
    feed = Feed(
        run.manifest,
        position,
        settings=feed_settings(config),
        reader=shard_reader(config, run.manifest),
        crop=MultiCrop(config.crops, seed=config.stream.seed),
        ranks=ranks,
        select=select,
        growth=_growth(run) if config.stream.follow else None,
        hooks=Hooks(
            drain=drain,
            wants_save=lambda: saver.due(feed.trained + feed.position.grid.batch),
            wants_log=monitor.log_due,
            on_passed_over=lambda each: monitor.passed_over(each, feed.shard_key(each)),
            on_idle=lambda idle: trainer.idle(idle),  # noqa: PLW0108 - it is built from this feed
            on_grown=monitor.grown,
        ),
    )
    trainer = Trainer(
        learner=learner,
        feed=feed,
        augment=Augment(config.crops),
        pace=make_pace(
            config,
            samples=_run_samples(run.config, run.manifest),
            size=run.manifest.total_bytes(config.stream.passes_by_url),
        ),
        saver=saver,
        monitor=monitor,
        step=restored.step if restored else 0,
        images_limit=config.training.images,
        device=ranks.device,
    )
    return trainer, feed


def feed_settings(config: Config) -> FeedSettings:
    """Return what the feed needs of a resolved configuration."""
    return FeedSettings(
        workers=known(config.loader.workers),
        prefetch=config.loader.prefetch,
        skip_ratio=config.stream.skip_ratio,
        skip_probation=config.stream.skip_probation,
        shard_ratio=config.stream.shard_ratio,
    )


def shard_reader(config: Config, manifest: Manifest) -> ShardReader:
    """Return what opens the shards of a resolved configuration."""
    return ShardReader(
        manifest,
        config.storage,
        read_ahead=config.loader.read_ahead,
        requests=config.loader.requests,
        memory=config.stream.memory,
    )


def _load_selection(run: Run) -> Selection:
    """Read what is not trained; every rank does, since predicates are functions of this machine."""
    size_of = partial(image_size, exif_orientation=run.config.crops.exif_orientation)
    select = load_selection(run.config.stream, run.store, size_of=size_of)
    if run.config.stream.exclude or run.config.stream.where:
        run.reporter.event(
            "selection",
            f"{select.excluded_keys:,} keys are excluded, {len(run.config.stream.where)} conditions hold",
            digest=select.digest,
        )
    return select


def _growth(run: Run) -> Growth:
    config, reporter = run.config, run.reporter
    return Growth(
        config.stream.urls,
        run.store,
        run.manifest,
        join(config.run.directory, MANIFEST_FILE),
        seconds=config.stream.follow_seconds,
        idle_seconds=config.stream.follow_idle_seconds,
        on_found=lambda count: reporter.event("grown", f"{count} new shards join the run", shards=count),
    )


def _on_grid(config: Config, grid: Grid) -> Config:
    """The configuration for the batch that this number of ranks can share."""
    training = config.training.model_copy(update={"batch": grid.batch})
    return config.model_copy(update={"training": training})


def _run_samples(config: Config, manifest: Manifest) -> int | None:
    return run_samples(config, manifest.total(config.stream.passes_by_url))


def _start_position(run: Run, restored: Restored | None) -> Position:
    """The restored position, on a grid that this number of ranks and workers divides, or the beginning.

    Raises:
        PositionError: the shards, the grid or the seed of the configuration are not the run's, or the ranks
            cannot share the batch.
    """
    config, begun = run.config, _grid(run.config)
    passes = config.stream.passes_by_url
    if restored is None:
        return Position(run.manifest.digest, begun, config.stream.seed, passes)
    position = reopened(restored.position, passes)
    position.covered(run.manifest)
    world_size, workers = run.ranks.world_size, known(config.loader.workers)
    grid = fit_grid(position.grid, begun, world_size=world_size, workers=workers)
    if grid != position.grid:
        run.reporter.event(
            "replanned",
            f"{world_size} ranks x {workers} workers do not divide the lane grid ({_shape(position.grid)}): "
            f"what is left of the pass is dealt again, each sample still exactly once ({_shape(grid)})",
            batch=grid.batch,
            columns=grid.columns,
            rows=grid.rows,
        )
    return position.on_grid(run.manifest, grid)


def _shape(grid: Grid) -> str:
    return f"{grid.columns} columns, {grid.rows} rows, batches of {grid.batch}"


def reopened(position: Position, passes: tuple[int, ...]) -> Position:
    """Return the position for so many passes; a stream at its end goes on where more are asked for now.

    Raises:
        PositionError: the passes over one of several sources were changed.
    """
    if passes == position.passes:
        return position
    if len(passes) != len(position.passes) or len({*passes}) > 1 or len({*position.passes}) > 1:
        raise PositionError(
            f"the run began with stream.passes = {list(position.passes)}, now it is {list(passes)}: passes "
            "over several URLs can be changed only where all have the same number; set it back"
        )
    finished = position.finished and position.turn >= max(passes)
    return replace(position, passes=passes, finished=finished)


def _grid(config: Config) -> Grid:
    stream = config.stream
    return Grid(known(config.training.batch), known(stream.columns), known(stream.rows), stream.window)


def _about(config: Config, ranks: Ranks) -> dict[str, str]:
    digest = hashlib.blake2b(dump_config(config).encode(), digest_size=6).hexdigest()
    return {"version": __version__, "world_size": str(ranks.world_size), "config_hash": digest}


def _summarise(run: Run, trainer: Trainer, feed: Feed, monitor: Monitor, saver: Saver) -> dict[str, Any]:
    """Write what the run came to; of a run that was at its end before, what was written then stands."""
    config, position, passes = run.config, feed.position, feed.position.passes
    place = join(config.run.directory, "summary.json")
    loss = monitor.loss_last
    left = sum(len(piece.named() or ()) for piece in position.carried) if position.finished else None
    counts = {outcome: position.total(outcome).samples for outcome in OUTCOMES}
    listed = feed.manifest.total(position.passes)
    missing = None if left is None or listed is None else listed - sum(counts.values()) - left
    if missing:
        run.reporter.event(
            "missing",
            f"{missing} samples of _stats.json were not in the shards ({len(position.damages)} damages)",
        )
    summary = {
        "images": position.trained,
        "steps": trainer.step,
        "images_per_second": round(monitor.images_per_second, 1),
        "seed": config.stream.seed,
        "loss_first": monitor.loss_first,
        "loss_last": loss if math.isfinite(loss) else None,
        "ln_prototypes": math.log(known(config.swav.prototypes)),
        "stream": {
            "manifest": listed,
            **counts,
            "damages": len(position.damages),
            "left": left,
            "missing": missing,
            "passes": passes[0] if len({*passes}) == 1 else list(passes),
            "sources": _by_source(config, position),
        },
        "checkpoint": saver.last.url if saver.last else None,
        "shards_url": redact(config.stream.urls[0]),
    }
    if monitor.images_per_second == 0 and run.store.exists(place):
        before: dict[str, Any] = json.loads(run.store.read(place))
        if before["stream"]["left"] == left:
            return before
        summary |= {name: before[name] for name in ("images_per_second", "loss_first", "loss_last")}
    if position.finished:
        _list_left(run, feed)
    run.store.write(place, json.dumps(summary, indent=1).encode())
    return summary


def _list_left(run: Run, feed: Feed) -> None:
    """Name the samples that were left over, fewer than a batch, beside the checkpoints."""
    reader = shard_reader(run.config, feed.manifest)
    left = list_left(feed.position.carried, reader.open)
    lines = "".join(json.dumps(each.to_json(feed.manifest)) + "\n" for each in left)
    run.store.write(join(run.config.run.directory, LEFT_FILE), lines.encode())


def _by_source(config: Config, position: Position) -> dict[str, dict[str, int]]:
    """Samples of each URL by outcome."""
    urls = enumerate(map(redact, config.stream.urls))
    return {
        url: {outcome: by_source[source].samples for outcome, by_source in position.tallies.items()}
        for source, url in urls
    }


def cooldown(config: Config, drain: Drain, *, images: int | None) -> dict[str, Any]:
    """Go on with a run of constant rate for `images` more, over which the rate falls to its end.

    Args:
        config: the run's configuration.
        drain: whether to stop.
        images: default: a tenth of those seen.

    Raises:
        CheckpointError: there is nothing to go on from.
        StreamswavError: as `pretrain`.
    """
    _refuse_incomplete(config)
    checkpoint, files = find_checkpoint(config.run.directory, Store(config.storage))
    position = Position.from_json(json.loads(files["position.json"]))
    saved = parse_config(yaml.safe_load(files["config.yaml"]))
    # A cool-down that was interrupted goes on to the end it had.
    if saved.optimizer.cooldown_images and saved.training.images:
        return pretrain(_with_end(config, saved.optimizer.cooldown_images, saved.training.images), drain)
    if reopened(position, config.stream.passes_by_url).finished:
        reason = "the stream is at its end; a cool-down needs images: ask for one pass more"
        raise ConfigError("stream.passes", reason, value=config.stream.passes)
    length = images or position.trained // 10
    whole = run_samples(saved.model_copy(update={"stream": _with_passes(saved, config)}), None)
    if whole:
        left = whole - position.trained
        if images and images > left:
            reason = f"only {left} images are left in the stream: ask for fewer, or for another pass"
            raise ConfigError("--images", reason, value=images)
        length = min(length, left)
    return pretrain(_with_end(config, length, checkpoint.images + length), drain)


def _with_passes(saved: Config, config: Config) -> StreamSection:
    return saved.stream.model_copy(update={"passes": config.stream.passes})


def _with_end(config: Config, length: int, end: int) -> Config:
    values = config.model_dump()
    values["optimizer"] |= {"schedule": "constant", "cooldown_images": length}
    values["training"]["images"] = end
    return parse_config(values)
