"""The plan: which lane reads what, and what is left to read. Pure functions on plain data.

A pass is dealt into a grid of lanes, V columns by R rows. Global batch t takes row t mod R, and G/V samples
from each of its columns. So the samples of a batch follow from the plan alone, however many ranks and
workers run it. When a lane cannot fill its share, what is left of all lanes is dealt again: a new
generation. A lane, never a rank or a worker, is the unit of order, state and ownership.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streamswav.errors import PositionError
from streamswav.philox import permutation
from streamswav.stream.outcomes import PassedOver

ORDER_VERSION = 2
"""Rises when the same seed would give another order; a position of another version is refused."""


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


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a shard: its samples from `ordinal` on with ordinal = residue (mod stride), but those done.

    Attributes:
        shard: index in the manifest.
        turn: pass that the samples belong to (the left-over of a pass is read in the next one).
        offset: byte at which sample `ordinal` starts.
        ordinal: the first sample's number in the shard.
        stride: every how manieth sample is meant.
        residue: which of them.
        done: bitmap; bit i is sample `ordinal + i`, consumed already. A negative number has all higher bits
            set: such a piece names its samples one by one.
    """

    shard: int
    turn: int
    offset: int = 0
    ordinal: int = 0
    stride: int = 1
    residue: int = 0
    done: int = 0

    def wants(self, ordinal: int) -> bool:
        """Tell whether the sample belongs to this piece."""
        return ordinal % self.stride == self.residue and not self.done >> (ordinal - self.ordinal) & 1

    def exhausted_at(self, ordinal: int) -> bool:
        """Tell whether nothing from `ordinal` on is wanted."""
        return self.done >> (ordinal - self.ordinal) == -1

    def named(self) -> list[int] | None:
        """Return the ordinals of a piece that names them, else None."""
        if self.done >= 0:
            return None
        bits = ~self.done
        listed = (self.ordinal + i for i in range(bits.bit_length()) if bits >> i & 1)
        return [ordinal for ordinal in listed if ordinal % self.stride == self.residue]

    def split(self, parts: int) -> list[Piece]:
        """Cut into `parts` pieces by stride."""
        stride = self.stride * parts
        return [replace(self, stride=stride, residue=self.residue + self.stride * i) for i in range(parts)]

    def to_json(self) -> list[Any]:
        """Return plain data that `from_json` reads."""
        numbers = [self.shard, self.turn, self.offset, self.ordinal, self.stride, self.residue]
        return [*numbers, f"{self.done:x}"]

    @staticmethod
    def from_json(values: Sequence[Any]) -> Piece:
        """Read what `to_json` gave."""
        shard, turn, offset, ordinal, stride, residue, done = values
        return Piece(shard, turn, offset, ordinal, stride, residue, int(done, 16))


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a lane is: the start of its current window, and which of the window's samples are consumed.

    Attributes:
        segment: index of the piece in the lane at which the window starts.
        offset: byte in that piece's shard.
        ordinal: ordinal of the sample at that byte.
        window: number of windows before it.
        done: (segment, bitmap) pairs; bit i is the sample i after the window's start in the first segment,
            and after the piece's own start in later ones.
    """

    segment: int = 0
    offset: int = 0
    ordinal: int = 0
    window: int = 0
    done: tuple[tuple[int, int], ...] = ()

    @property
    def emitted(self) -> int:
        """Samples consumed from the current window."""
        return sum(bitmap.bit_count() for _, bitmap in self.done)

    def to_json(self) -> list[Any]:
        """Return plain data that `from_json` reads."""
        done = [[segment, f"{bitmap:x}"] for segment, bitmap in self.done]
        return [self.segment, self.offset, self.ordinal, self.window, done]

    @staticmethod
    def from_json(values: Sequence[Any]) -> Cursor:
        """Read what `to_json` gave."""
        segment, offset, ordinal, window, done = values
        bitmaps = tuple((each, int(bitmap, 16)) for each, bitmap in done)
        return Cursor(segment, offset, ordinal, window, bitmaps)


@dataclass(frozen=True)
class Plan:
    """One generation: the pieces of every lane, in reading order.

    Attributes:
        grid: its shape.
        seed: of the order.
        turn: the pass.
        generation: how often the pass was dealt before.
        lanes: pieces by lane; `len(lanes) == grid.lanes`.
    """

    grid: Grid
    seed: int
    turn: int
    generation: int
    lanes: tuple[tuple[Piece, ...], ...] = field(repr=False)

    def start(self, lane: int) -> Cursor:
        """Return the cursor of a lane that has given nothing yet."""
        pieces = self.lanes[lane]
        return Cursor(0, pieces[0].offset, pieces[0].ordinal) if pieces else Cursor()

    def window_order(self, lane: int, window: int, count: int) -> list[int]:
        """Return the order in which the `count` samples of a window are given."""
        return permutation(count, "window", self.seed, self.turn, self.generation, lane, window)


def deal(
    pieces: Sequence[Piece], sizes: Sequence[int], *, grid: Grid, seed: int, turn: int, generation: int
) -> Plan:
    """Deal pieces into lanes: in a random order, each to the lane that has the fewest bytes so far.

    Args:
        pieces: what is to be read.
        sizes: bytes left in each piece, to balance the lanes.
        grid: shape of the plan.
        seed: of the order; another pass or generation gives another one.
        turn: the pass.
        generation: the generation of that pass.
    """
    lanes: list[list[Piece]] = [[] for _ in range(grid.lanes)]
    loads = [(0, lane) for lane in permutation(grid.lanes, "lanes", seed, turn, generation)]
    heapq.heapify(loads)
    for index in permutation(len(pieces), "pieces", seed, turn, generation):
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], lane))
        lanes[lane].append(pieces[index])
    return Plan(grid, seed, turn, generation, tuple(map(tuple, lanes)))


@dataclass(frozen=True)
class Deal:
    """What a generation is dealt from: plain data from which the plan follows again.

    Attributes:
        whole: indices of the shards of which nothing was read, growing.
        pieces: parts of other shards, and what earlier passes left over.
        one_by_one: every piece names its samples, and these are dealt, not the pieces.
    """

    whole: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    one_by_one: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads; a bit for each shard that may be whole."""
        flags = np.zeros(max(self.whole, default=-1) + 1, np.uint8)
        flags[list(self.whole)] = 1
        return {
            "whole": np.packbits(flags).tobytes().hex(),
            "pieces": [piece.to_json() for piece in self.pieces],
            "one_by_one": self.one_by_one,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Deal:
        """Read what `to_json` gave."""
        flags = np.unpackbits(np.frombuffer(bytes.fromhex(values["whole"]), np.uint8))
        pieces = tuple(Piece.from_json(each) for each in values["pieces"])
        return Deal(tuple(np.flatnonzero(flags).tolist()), pieces, values["one_by_one"])


def make_plan(
    dealt: Deal, shard_sizes: Sequence[int], *, grid: Grid, seed: int, turn: int, generation: int
) -> Plan:
    """Make the plan of a generation.

    Args:
        dealt: what is to be read.
        shard_sizes: bytes of the manifest's shards.
        grid: shape of the plan.
        seed: of the order; another pass or generation gives another one.
        turn: the pass.
        generation: the generation of that pass.
    """
    order = {"seed": seed, "turn": turn, "generation": generation}
    if dealt.one_by_one:
        return deal_samples(dealt.pieces, grid=grid, **order)
    pieces = [*dealt.pieces, *(Piece(index, turn) for index in dealt.whole)]
    pieces, sizes = split_pieces(pieces, shard_sizes, lanes=grid.lanes)
    return deal(pieces, sizes, grid=grid, **order)


def gather_pieces(pieces: Iterable[Piece], *, turn: int) -> Deal:
    """Return pieces as what a generation of this pass is dealt from."""
    whole, parts = [], []
    for piece in pieces:
        if piece == Piece(piece.shard, turn):
            whole.append(piece.shard)
        else:
            parts.append(piece)
    return Deal(tuple(sorted(whole)), tuple(parts))


def split_pieces(
    pieces: Sequence[Piece], shard_sizes: Sequence[int], *, lanes: int, per_lane: int = 4
) -> tuple[list[Piece], list[int]]:
    """Split pieces by stride where there are too few of them to balance the lanes.

    Enough pieces (`per_lane` for each lane) are left whole: strides make several lanes read one shard.

    Returns:
        The pieces and the bytes left in each.
    """
    sizes = [bytes_left(piece, shard_sizes) for piece in pieces]
    if len(pieces) >= per_lane * lanes:
        return list(pieces), sizes
    target = max(1, sum(sizes) // (per_lane * lanes))
    split, split_sizes = [], []
    for piece, size in zip(pieces, sizes, strict=True):
        parts = min(lanes, max(1, round(size / target)))
        split += piece.split(parts)
        split_sizes += [size // parts] * parts
    return split, split_sizes


def remaining(plan: Plan, cursors: Mapping[int, Cursor]) -> list[Piece]:
    """Return what is left of a plan: every sample that no cursor has passed, exactly once."""
    left: list[Piece] = []
    for lane, pieces in enumerate(plan.lanes):
        cursor = cursors.get(lane)
        if cursor is None:
            left += pieces
            continue
        done = dict(cursor.done)
        for segment, piece in enumerate(pieces[cursor.segment :], cursor.segment):
            begun = piece
            if segment == cursor.segment:
                shift = cursor.ordinal - piece.ordinal
                begun = replace(piece, offset=cursor.offset, ordinal=cursor.ordinal, done=piece.done >> shift)
            left.append(replace(begun, done=begun.done | done.get(segment, 0)))
    return [piece for piece in left if not piece.exhausted_at(piece.ordinal)]


def without(pieces: Iterable[Piece], passed_over: Iterable[PassedOver]) -> list[Piece]:
    """Mark samples that are passed over as done in the pieces that hold them."""
    gone: dict[tuple[int, int], list[int]] = {}
    for each in passed_over:
        if each.ordinal is not None:
            gone.setdefault((each.shard, each.turn), []).append(each.ordinal)
    left = []
    for piece in pieces:
        held = (n for n in gone.get((piece.shard, piece.turn), ()) if n >= piece.ordinal and piece.wants(n))
        left.append(replace(piece, done=piece.done | sum(1 << (n - piece.ordinal) for n in held)))
    return left


def deal_samples(pieces: Sequence[Piece], *, grid: Grid, seed: int, turn: int, generation: int) -> Plan:
    """Deal samples one by one, so that all lanes come to their end together.

    Used for the end of a pass, where pieces of unknown length would leave lanes uneven. Each lane gets
    consecutive samples, so that hardly a byte is read twice; what is less than a batch follows at the end.

    Args:
        pieces: what is left; every piece names its samples.
        grid: shape of the plan.
        seed: of the order.
        turn: the pass.
        generation: the generation of that pass.
    """
    order = permutation(len(pieces), "samples", seed, turn, generation)
    listed = [(pieces[index], ordinal) for index in order for ordinal in pieces[index].named() or ()]
    batches = len(listed) // grid.batch
    shares = [grid.share * len(range(row, batches, grid.rows)) for row in range(grid.rows)]
    lanes = []
    at = 0
    for lane in range(grid.lanes):
        share = shares[lane // grid.columns]
        lanes.append(_name_only(listed[at : at + share]))
        at += share
    lanes[grid.lane(batches % grid.rows, 0)] += _name_only(listed[at:])
    return Plan(grid, seed, turn, generation, tuple(lanes))


def _name_only(samples: Sequence[tuple[Piece, int]]) -> tuple[Piece, ...]:
    """Pieces that name these samples and no others."""
    wanted: dict[Piece, int] = {}
    for piece, ordinal in samples:
        wanted[piece] = wanted.get(piece, 0) | 1 << (ordinal - piece.ordinal)
    return tuple(replace(piece, done=~bits) for piece, bits in wanted.items())


def bytes_left(piece: Piece, shard_sizes: Sequence[int]) -> int:
    """Return about how many bytes of its shard the piece still stands for."""
    return (shard_sizes[piece.shard] - piece.offset) // piece.stride


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
