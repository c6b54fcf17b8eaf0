"""The grid of lanes, and which one a number of ranks and workers can go on with."""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.errors import PositionError


@dataclass(frozen=True, slots=True)
class Grid:
    """Shape of a plan; it never depends on ranks, workers or memory.

    Attributes:
        batch: G, samples of a global batch.
        columns: V; divides the batch, and is a multiple of every world size that is used.
        rows: R; a multiple of every worker count that is used.
        window: W, samples of a lane that are permuted together.
    """

    batch: int
    columns: int
    rows: int
    window: int

    @property
    def share(self) -> int:
        """Samples that a column gives to a batch."""
        return self.batch // self.columns

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return self.columns * self.rows

    def lane(self, row: int, column: int) -> int:
        """Return the number of the lane at `row` and `column`."""
        return row * self.columns + column


def fit_grid(current: Grid, begun: Grid, *, world_size: int, workers: int) -> Grid:
    """Return the grid on which so many ranks and workers can go on.

    The current one where they divide it, else the one that the run began with where they divide that, so
    that ranks which come back bring the batch back; else a new one: as many columns as there were, rounded
    down to a multiple of the ranks, the largest batch that these divide, and as many rows, rounded down
    to a multiple of the workers.

    Raises:
        PositionError: the ranks cannot share the batch.
    """
    workers = max(1, workers)
    for grid in (current, begun):
        if grid.columns % world_size == 0 and grid.rows % workers == 0:
            return grid
    if world_size > begun.batch:
        raise PositionError(
            f"{world_size} ranks cannot share the run's global batch of {begun.batch} samples; use fewer"
        )
    columns = _multiple_below(begun.columns, world_size)
    return Grid(
        batch=begun.batch // columns * columns,
        columns=columns,
        rows=_multiple_below(begun.rows, workers),
        window=begun.window,
    )


def _multiple_below(number: int, factor: int) -> int:
    return max(factor, number // factor * factor)


def check_grid(grid: Grid, *, world_size: int, workers: int) -> None:
    """Refuse a topology that does not divide the grid of a new run.

    Raises:
        PositionError: with the numbers that would do.
    """
    if grid.columns % world_size:
        raise PositionError(
            f"{world_size} ranks do not divide the {grid.columns} columns of the lane grid (stream.columns)"
        )
    if grid.rows % max(1, workers):
        raise PositionError(
            f"{workers} workers do not divide the {grid.rows} rows of the lane grid (stream.rows)"
        )
