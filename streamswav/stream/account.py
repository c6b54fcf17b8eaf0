"""The account of a run: what became of every sample, and whether it adds up. Pure functions on plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamswav.stream.manifest import Manifest
from streamswav.stream.plan import Piece
from streamswav.stream.samples import OpenPiece
from streamswav.stream.tar import TarSample

Part = tuple[int, int]
"""A shard (index in the manifest) in a pass."""


@dataclass(frozen=True, slots=True)
class LeftSample:
    """A sample that was neither trained nor passed over.

    Attributes:
        shard: index in the manifest.
        turn: the pass.
        ordinal: its number in the shard.
        start: first byte; None where the shard cannot be read any more.
        stop: the byte after the last; None as `start`.
        key: its name; "" as `start`.
    """

    shard: int
    turn: int
    ordinal: int
    start: int | None
    stop: int | None
    key: str

    def to_json(self, manifest: Manifest) -> dict[str, Any]:
        """Return plain data that names the shard by its key."""
        return {**asdict(self), "shard": manifest.shards[self.shard].key}


def list_left(pieces: Iterable[Piece], open_piece: OpenPiece) -> Iterator[LeftSample]:
    """Yield the samples that pieces stand for, by shard, pass and ordinal.

    Args:
        pieces: what is left (`Position.left`).
        open_piece: opens a shard (`ShardReader.open`); read as far as the last sample that is left.

    Raises:
        StorageError: a shard is out of reach. One that is gone or was changed is none: what its pieces name
            is yielded without place and key.
    """
    for (shard, turn), group in sorted(by_part(pieces).items()):
        met = -1
        for item in open_piece(min(group, key=_offset)):
            if not isinstance(item, TarSample):
                continue
            met = item.ordinal
            if holds(group, met):
                yield LeftSample(shard, turn, met, item.start, item.stop, item.key)
            if all(piece.exhausted_at(max(met + 1, piece.ordinal)) for piece in group):
                break
        unmet = {ordinal for piece in group for ordinal in piece.named() or () if ordinal > met}
        for ordinal in sorted(unmet):
            yield LeftSample(shard, turn, ordinal, None, None, "")


def by_part(pieces: Iterable[Piece]) -> dict[Part, list[Piece]]:
    """Return pieces by the shard and the pass that they are part of."""
    parts: dict[Part, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault((piece.shard, piece.turn), []).append(piece)
    return parts


def holds(pieces: Sequence[Piece], ordinal: int) -> bool:
    """Tell whether one of a shard's pieces stands for the sample."""
    return any(piece.ordinal <= ordinal and piece.wants(ordinal) for piece in pieces)


def _offset(piece: Piece) -> int:
    return piece.offset
