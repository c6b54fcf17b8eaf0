"""The feed of a resolved configuration: what trains, and what only reads, are given the same."""

from __future__ import annotations

from functools import partial

from streamswav.config import Config
from streamswav.crops import MultiCrop, image_size
from streamswav.defaults import known
from streamswav.errors import ConfigError
from streamswav.stream.grid import Grid
from streamswav.stream.labels import Labels
from streamswav.stream.manifest import Manifest
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.select import Selection, load_selection
from streamswav.stream.store import Store
from streamswav.telemetry.metrics import Metrics
from streamswav.training.budgets import Budgets
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, FeedSettings, Hooks
from streamswav.training.growth import Growth


def begun_grid(config: Config) -> Grid:
    """Return the lane grid that a run of this configuration begins with."""
    stream = config.stream
    return Grid(known(config.training.batch), known(stream.columns), known(stream.rows), stream.window)


def build_feed(
    config: Config,
    manifest: Manifest,
    position: Position,
    ranks: Ranks,
    *,
    select: Selection,
    crop: MultiCrop | None = None,
    labels: Labels | None = None,
    growth: Growth | None = None,
    hooks: Hooks | None = None,
    metrics: Metrics | None = None,
) -> Feed:
    """Build what gives batches from a position on.

    Args:
        config: resolved.
        manifest: the shards.
        position: where to go on, on a grid that ranks and workers divide.
        ranks: who shares the batches.
        select: what is not trained.
        crop: instead of the configuration's.
        labels: of the samples, where they are wanted; one without a usable label is passed over.
        growth: finds new shards of a stream that is followed.
        hooks: of the feed.
        metrics: count what is read.

    Raises:
        ConfigError: `stream.memory` does not do for the lanes of a worker.
        PositionError: ranks or workers do not divide the position's grid.
    """
    stream, loader, workers = config.stream, config.loader, known(config.loader.workers)
    grid = position.grid
    lanes = max(1, grid.rows // max(1, workers)) * max(1, grid.columns // ranks.world_size)
    return Feed(
        manifest,
        position,
        settings=FeedSettings(
            workers=workers,
            prefetch=loader.prefetch,
            budgets=Budgets(stream.skip_ratio, stream.skip_probation, stream.shard_ratio),
        ),
        reader=build_reader(config, manifest, lanes=lanes, metrics=metrics),
        crop=crop or MultiCrop(config.crops, seed=stream.seed),
        labels=labels,
        ranks=ranks,
        select=select,
        growth=growth,
        hooks=hooks,
    )


def build_reader(
    config: Config, manifest: Manifest, *, lanes: int = 1, metrics: Metrics | None = None
) -> ShardReader:
    """Return what opens shards for so many lanes of a process.

    Raises:
        ConfigError: `stream.memory` does not do for them.
    """
    return ShardReader(
        manifest,
        config.storage,
        read_ahead=config.loader.read_ahead,
        requests=config.loader.requests,
        memory=config.stream.memory,
        lanes=lanes,
        window=config.stream.window,
        metrics=metrics,
    )


def build_selection(config: Config, store: Store) -> Selection:
    """Read the lists and conditions of what is not trained.

    Raises:
        ConfigError: they cannot be understood.
        StorageError: a list cannot be read.
    """
    size_of = partial(image_size, exif_orientation=config.crops.exif_orientation)
    return load_selection(config.stream, store, size_of=size_of)


def agree_on_selection(config: Config, store: Store, ranks: Ranks) -> Selection:
    """Read them on every rank, since predicates are functions of its machine.

    Raises:
        ConfigError: they cannot be understood, or are others on another rank.
        StorageError: a list cannot be read.
    """
    held: list[Selection] = []

    def load() -> str:
        held.append(build_selection(config, store))
        return held[0].digest

    if len({*ranks.each(load)}) > 1:
        reason = "the ranks read other lists: put them where all of them find the same"
        raise ConfigError("stream.exclude", reason, value=config.stream.exclude)
    return held[0]
