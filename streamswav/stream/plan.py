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

from streamswav.philox import permutation
from streamswav.stream.grid import Grid
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.pieces import Cursor, Piece

ORDER_VERSION = 2
"""Rises when the same seed would give another order; a position of another version is refused."""


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
