"""What became of samples and bytes that are not trained."""

from __future__ import annotations

from dataclasses import dataclass

OUTCOMES = ("trained", "excluded", "filtered", "quarantined", "skipped_step")
"""What may become of a sample; what no outcome was found for yet is left."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Bytes that are not trained, and why.

    Attributes:
        shard: index in the manifest.
        turn: the pass.
        reason: short label (`truncated`, `no_image`).
        start: first byte.
        stop: the byte after the last.
        key: the sample's key, or "" for damage.
        ordinal: the sample's number in the shard, or None for damage.
        outcome: one of `OUTCOMES`.
    """

    shard: int
    turn: int
    reason: str
    start: int
    stop: int
    key: str = ""
    ordinal: int | None = None
    outcome: str = "quarantined"
