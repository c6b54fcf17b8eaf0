"""Lanes of one process that stride one shard: it is fetched and parsed once, for all of them.

Whoever comes first to a sample parses it. The places of all samples are kept, 8 bytes each. A sample that
another lane will want is kept whole as far as there is room, else read again by its place; where samples
are so small that this would not pay, the lane goes on alone.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from streamswav.stream.pieces import Piece
from streamswav.stream.tar import Damage, TarSample

SMALL_BYTES = 32 << 10
"""Samples below this size are not worth a request of their own."""

Items = Iterator[TarSample | Damage]
OpenPiece = Callable[[Piece], Items]


class Room(Protocol):
    """Where samples are kept for other lanes."""

    def lend(self, sample: TarSample) -> TarSample:
        """Return the sample as it fits, whole or without its bytes."""

    def release(self, sample: TarSample) -> None:
        """A sample that was kept whole is no longer."""


class SharedShards:
    """The shards that lanes of this process stride."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._walks: dict[int, list[_Walk]] = {}
        self._wanted: dict[int, dict[tuple[int, int], int]] = {}

    def expect(self, piece: Piece) -> None:
        """A lane will read this piece; all should say so before the first of them reads."""
        if piece.stride > 1:
            self._wanted.setdefault(piece.shard, {})[piece.stride, piece.residue] = piece.ordinal

    def open(self, piece: Piece, open_piece: OpenPiece) -> Items:
        """Return what is in a piece's shard from the piece's offset on, some samples without their bytes."""
        if piece.stride == 1:
            return open_piece(piece)
        walks = self._walks.setdefault(piece.shard, [])
        for walk in walks:
            number = walk.find(piece)
            if number is not None:
                return _Follower(walk, number, piece, open_piece)
        walks.append(_Walk(open_piece(piece), piece, self._wanted.get(piece.shard, {}), self._room))
        return _Follower(walks[-1], 0, piece, open_piece)


class _Walk:
    """One parse of a shard, from some sample on.

    Attributes:
        length: items that were parsed.
    """

    def __init__(self, items: Items, piece: Piece, wanted: dict[tuple[int, int], int], room: Room) -> None:
        self._items, self._wanted, self._room = items, wanted, room
        self._first, self._passed = piece.ordinal, list[int]()
        self._starts = array("q", [piece.offset])
        self._damages: dict[int, str] = {}
        self._too_large: dict[int, TarSample] = {}
        self._lent: dict[int, TarSample] = {}
        self.length = 0

    def find(self, piece: Piece) -> int | None:
        """Return the number of the item at which a piece begins, if it was parsed or comes next."""
        number = bisect_left(self._starts, piece.offset)
        known = number < len(self._starts) and self._starts[number] == piece.offset
        return number if known and self.ordinal(number) == piece.ordinal else None

    def ordinal(self, number: int) -> int:
        """Return the ordinal of a sample, or of the sample after a damage."""
        return self._first + number - bisect_left(self._passed, number)

    def parse(self, mine: Piece) -> TarSample | Damage:
        """Parse the next item: whole for the lane that asks, lent where another one wants it.

        Raises:
            StopIteration: the shard is at its end.
        """
        item = next(self._items)
        number = self.length
        if isinstance(item, Damage):
            self._damages[number] = item.reason
            self._passed.append(number)
        elif item.reason:
            self._too_large[number] = item
        elif not _is_of(item.ordinal, mine.stride, mine.residue):
            item = self._lend(number, item)
        self._starts.append(item.stop)
        self.length += 1
        return item

    def known(self, number: int, mine: Piece) -> TarSample | Damage:
        """Return an item that was parsed before: whole if it was kept for the lane that asks."""
        start, stop = self._starts[number], self._starts[number + 1]
        if number in self._damages:
            return Damage(self._damages[number], start, stop)
        if number in self._too_large:
            return self._too_large[number]
        ordinal = self.ordinal(number)
        if number in self._lent and _is_of(ordinal, mine.stride, mine.residue):
            return self._give_up(number)
        return TarSample("", ordinal, start, stop, {})

    def leave(self, mine: Piece) -> None:
        """A lane goes on alone: what was kept for it is of no use."""
        self._wanted.pop((mine.stride, mine.residue), None)
        for number in [each for each in self._lent if _is_of(self.ordinal(each), mine.stride, mine.residue)]:
            self._give_up(number)

    def _give_up(self, number: int) -> TarSample:
        sample = self._lent.pop(number)
        self._room.release(sample)
        return sample

    def _lend(self, number: int, sample: TarSample) -> TarSample:
        for (stride, residue), begun in self._wanted.items():
            if _is_of(sample.ordinal, stride, residue) and sample.ordinal >= begun:
                lent = self._room.lend(sample)
                if lent.members:
                    self._lent[number] = lent
                break
        return replace(sample, members={})


class _Follower:
    """One lane's way along a walk."""

    def __init__(self, walk: _Walk, number: int, piece: Piece, open_piece: OpenPiece) -> None:
        self._walk, self._number, self._piece, self._open = walk, number, piece, open_piece
        self._alone: Items | None = None

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> TarSample | Damage:
        if self._alone is not None:
            return next(self._alone)
        if self._number == self._walk.length:
            item = self._walk.parse(self._piece)
        else:
            item = self._walk.known(self._number, self._piece)
            if isinstance(item, TarSample) and self._is_not_worth_it(item):
                return self._go_alone(item)
        self._number += 1
        return item

    def _is_not_worth_it(self, item: TarSample) -> bool:
        """Tell whether a sample is this lane's and would take a small request of its own."""
        return (
            not (item.members or item.reason)
            and self._piece.wants(item.ordinal)
            and item.stop - item.start < SMALL_BYTES
        )

    def _go_alone(self, item: TarSample) -> TarSample | Damage:
        piece = self._piece
        self._walk.leave(piece)
        done = piece.done >> (item.ordinal - piece.ordinal)
        self._alone = self._open(replace(piece, offset=item.start, ordinal=item.ordinal, done=done))
        return next(self._alone)


def _is_of(ordinal: int, stride: int, residue: int) -> bool:
    return ordinal % stride == residue
