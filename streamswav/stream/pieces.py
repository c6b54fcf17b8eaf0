"""Parts of shards, and how far a lane is in its own: plain data, small whatever the shards hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Part = tuple[int, int]
"""A shard (index in the manifest) in a pass."""


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


def by_part(pieces: Iterable[Piece]) -> dict[Part, list[Piece]]:
    """Return pieces by the shard and the pass that they are part of."""
    parts: dict[Part, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault((piece.shard, piece.turn), []).append(piece)
    return parts


def holds(pieces: Sequence[Piece], ordinal: int) -> bool:
    """Tell whether one of a shard's pieces stands for the sample."""
    return any(piece.ordinal <= ordinal and piece.wants(ordinal) for piece in pieces)
