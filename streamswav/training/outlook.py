"""What is ahead of a stream: how many samples it still holds, and how evenly its lanes will end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import OUTCOMES, Tally
from streamswav.stream.pieces import Cursor
from streamswav.stream.plan import Plan, bytes_left
from streamswav.stream.position import Position


@dataclass(frozen=True)
class Outlook:
    """What is ahead, as far as it can be told.

    Attributes:
        samples: left in the stream, all passes; None while their size is not known.
        lags: for each lane, how many samples it holds beyond the lane that ends first. When that one ends,
            what the others hold is dealt again.
    """

    samples: float | None
    lags: Sequence[float]


class LaneBytes:
    """How many bytes of their shards the lanes of a plan hold, beyond a cursor.

    Where pieces name their samples lanes were dealt to end together, and nothing is told of them.

    Args:
        plan: the lanes.
        sizes: bytes of the shards.
    """

    def __init__(self, plan: Plan, sizes: Sequence[int]) -> None:
        self._lanes = plan.lanes
        named = any(piece.done < 0 for lane in plan.lanes for piece in lane)
        held = () if named else plan.lanes
        # Before each segment, and after the last one.
        self._sums = [
            np.cumsum([0, *(bytes_left(piece, sizes) for piece in lane)], dtype=np.int64) for lane in held
        ]

    def left(self, cursors: Mapping[int, Cursor]) -> list[int]:
        """Return the bytes that each lane still holds."""
        return [int(sums[-1]) - self._passed(lane, cursors.get(lane)) for lane, sums in enumerate(self._sums)]

    def _passed(self, lane: int, cursor: Cursor | None) -> int:
        if cursor is None or cursor.segment >= len(self._lanes[lane]):
            return 0 if cursor is None else int(self._sums[lane][-1])
        piece = self._lanes[lane][cursor.segment]
        return int(self._sums[lane][cursor.segment]) + (cursor.offset - piece.offset) // piece.stride


def look_ahead(position: Position, manifest: Manifest, *, run_bytes: int, lanes: LaneBytes | None) -> Outlook:
    """Return what is ahead of a position; `run_bytes` are those of all passes."""
    met = sum((position.total(outcome) for outcome in OUTCOMES), Tally())
    mean = met.bytes / met.samples if met.samples else 0.0
    known = manifest.total(position.passes)
    if known is not None:
        samples: float | None = max(0.0, known - met.samples)
    else:
        lost = sum(each.stop - each.start for each in position.damages)
        samples = max(0.0, run_bytes - met.bytes - lost) / mean if mean else None
    left = lanes.left(position.cursors) if lanes and mean else []
    return Outlook(samples, [(each - min(left)) / mean for each in left])
