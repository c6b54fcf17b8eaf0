"""What becomes of samples: trained, or passed over for a reason; counted, and told apart by digests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OUTCOMES = ("trained", "excluded", "filtered", "quarantined", "skipped_step")
"""What may become of a sample; one without an outcome is left."""

LOST_REASONS = ("missing_shard", "changed_shard")
"""Damages that tell of a shard that is gone; they have a budget of their own."""

_MODULUS = 1 << 64


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


@dataclass(frozen=True, slots=True)
class Tally:
    """How many samples, and which: the digest does not depend on the order in which they were added.

    Attributes:
        samples: their number.
        bytes: their bytes in the shards.
        digest: sum of `sample_digest` over them, modulo 2^64.
    """

    samples: int = 0
    bytes: int = 0
    digest: int = 0

    def __add__(self, other: Tally) -> Tally:
        digest = (self.digest + other.digest) % _MODULUS
        return Tally(self.samples + other.samples, self.bytes + other.bytes, digest)

    def __sub__(self, other: Tally) -> Tally:
        """Return what must be added to `other` to get this; numbers may be negative."""
        digest = (self.digest - other.digest) % _MODULUS
        return Tally(self.samples - other.samples, self.bytes - other.bytes, digest)

    def to_json(self) -> list[Any]:
        """Return plain data that `from_json` reads."""
        return [self.samples, self.bytes, f"{self.digest:016x}"]

    @staticmethod
    def from_json(values: Sequence[Any]) -> Tally:
        """Read what `to_json` gave."""
        samples, size, digest = values
        return Tally(samples, size, int(digest, 16))


def tally_one(shard_digest: int, turn: int, ordinal: int, start: int, stop: int) -> Tally:
    """Return the tally of one sample: bytes [start, stop) of a shard, in a pass."""
    return Tally(1, stop - start, sample_digest(shard_digest, turn, ordinal, start, stop))


def sample_digest(shard_digest: int, turn: int, ordinal: int, start: int, stop: int) -> int:
    """Return 64 bits that stand for one sample of one pass, wherever its shard lies."""
    text = f"{shard_digest:x} {turn} {ordinal} {start} {stop}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
