"""Where the stream of a run begins, and what of it is not trained."""

from __future__ import annotations

from streamswav.commands.run_folder import MANIFEST_FILE, Run
from streamswav.config import Config
from streamswav.defaults import known, run_samples
from streamswav.stream.grid import Grid, fit_grid
from streamswav.stream.manifest import Manifest
from streamswav.stream.position import Position
from streamswav.stream.select import Selection
from streamswav.stream.store import join
from streamswav.training.feeding import agree_on_selection, begun_grid
from streamswav.training.growth import Growth
from streamswav.training.restore import Restored


def agreed_selection(run: Run) -> Selection:
    """Read what is not trained, and say so."""
    select = agree_on_selection(run.config, run.store, run.ranks)
    if run.config.stream.exclude or run.config.stream.where:
        run.reporter.event(
            "selection",
            f"{select.excluded_keys:,} keys are excluded, {len(run.config.stream.where)} conditions hold",
            digest=select.digest,
        )
    return select


def growth_of(run: Run) -> Growth:
    """Return what finds the shards that join a stream that is followed."""
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


def on_grid(config: Config, grid: Grid) -> Config:
    """Return the configuration for the batch that this number of ranks can share."""
    training = config.training.model_copy(update={"batch": grid.batch})
    return config.model_copy(update={"training": training})


def samples_of(config: Config, manifest: Manifest) -> int | None:
    """Return the samples of all passes, where that is known."""
    return run_samples(config, manifest.total(config.stream.passes_by_url))


def start_position(run: Run, restored: Restored | None) -> Position:
    """Return the restored position, on a grid that these ranks and workers divide, or the beginning.

    Raises:
        PositionError: the shards, the grid or the seed of the configuration are not the run's, or the ranks
            cannot share the batch.
    """
    config, begun = run.config, begun_grid(run.config)
    passes = config.stream.passes_by_url
    if restored is None:
        return Position(run.manifest.digest, begun, config.stream.seed, passes)
    position = restored.position.with_passes(passes)
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
