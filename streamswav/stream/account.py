"""The account of a run: what became of every sample, and whether it adds up. Pure functions on plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from streamswav.stream.manifest import Manifest, Shard
from streamswav.stream.outcomes import LOST_REASONS, PassedOver, Tally, tally_one
from streamswav.stream.pieces import Part, Piece, by_part, holds
from streamswav.stream.position import Position
from streamswav.stream.samples import OpenPiece
from streamswav.stream.tar import Damage, TarSample

LEFT = "left"
DAMAGED = "damaged"
ARCHIVE_END = "archive_end"

_SHOWN = 3


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
        for item in open_piece(min(group, key=lambda piece: piece.offset)):
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


@dataclass(frozen=True, slots=True)
class Claims:
    """What a checkpoint and its lists say of a shard in a pass.

    Attributes:
        turn: the pass.
        left: pieces that are not consumed.
        passed: samples that were passed over, each once, none of them left.
        damages: stretches that could not be parsed.
    """

    turn: int
    left: tuple[Piece, ...] = ()
    passed: tuple[PassedOver, ...] = ()
    damages: tuple[PassedOver, ...] = ()

    @property
    def lost(self) -> str:
        """Why the shard cannot be recounted: it went missing or was changed; "" where it can."""
        return next((each.reason for each in self.damages if each.reason in LOST_REASONS), "")


@dataclass(frozen=True, slots=True)
class Range:
    """Neighbouring bytes [start, stop) of a shard with the same outcome for the same reason."""

    start: int
    stop: int
    outcome: str
    reason: str = ""


class PartAccount:
    """What became of a shard in a pass, by its headers and by what is claimed of it.

    Attributes:
        turn: the pass.
        tallies: by outcome, `LEFT` among them.
        damages: number of stretches that cannot be parsed.
        damaged_bytes: their bytes.
        end_bytes: bytes of the archive's end.
        ranges: all bytes of the shard, where they are asked for.
        problems: what does not fit; the first few, in words.
        problem_count: how many there are.
    """

    def __init__(self, claims: Claims, *, ranges: bool = False) -> None:
        self.turn = claims.turn
        self.tallies: dict[str, Tally] = {}
        self.damages = self.damaged_bytes = self.end_bytes = 0
        self.ranges: list[Range] = []
        self.problems: list[str] = []
        self.problem_count = 0
        self._left, self._keeps_ranges = claims.left, ranges
        self._passed = {each.ordinal: each for each in claims.passed}
        self._damages = {each.start: each for each in claims.damages}
        self._at = self._ordinal = 0

    def add(self, item: TarSample | Damage, shard_digest: int) -> None:
        """Account for what comes next in the shard."""
        if item.start != self._at:
            self._complain(f"bytes {self._at} and {item.start}: what lies there does not join")
        self._at = item.stop
        if isinstance(item, TarSample):
            self._add_sample(item, shard_digest)
        else:
            self._add_damage(item)

    def close(self, size: int) -> None:
        """Account for the archive's end, and for what is claimed but was not met."""
        self.end_bytes = size - self._at
        self._note(self._at, size, ARCHIVE_END)
        for passed in self._passed.values():
            self._complain(
                f"sample {passed.ordinal} is listed as {passed.outcome}, and the shard has no such sample"
            )
        for damage in self._damages.values():
            self._complain(
                f"bytes {damage.start} to {damage.stop}: the run found them {damage.reason}, now they are not"
            )

    def _add_sample(self, sample: TarSample, shard_digest: int) -> None:
        ordinal, outcome, reason = sample.ordinal, "trained", ""
        self._ordinal = ordinal + 1
        holders = sum(holds([piece], ordinal) for piece in self._left)
        passed = self._passed.pop(ordinal, None) if self._passed else None
        if holders:
            outcome = LEFT
            if holders > 1:
                self._complain(
                    f"sample {ordinal} would be given {holders} times: pieces that are left overlap"
                )
        elif passed:
            outcome, reason = passed.outcome, passed.reason
            if (passed.start, passed.stop) != (sample.start, sample.stop):
                self._complain(
                    f"sample {ordinal} is listed at bytes {passed.start} to {passed.stop}, and lies at "
                    f"{sample.start} to {sample.stop}"
                )
        one = tally_one(shard_digest, self.turn, ordinal, sample.start, sample.stop)
        self.tallies[outcome] = self.tallies.get(outcome, Tally()) + one
        self._note(sample.start, sample.stop, outcome, reason)

    def _add_damage(self, damage: Damage) -> None:
        claimed = self._damages.pop(damage.start, None)
        if claimed and (claimed.stop, claimed.reason) != (damage.stop, damage.reason):
            self._complain(
                f"bytes {damage.start} to {damage.stop} are {damage.reason}; the run found {claimed.reason} "
                f"up to {claimed.stop}"
            )
        # Whoever reads the sample that follows reports what lies ahead of it.
        if not claimed and not holds(self._left, self._ordinal):
            self._complain(
                f"bytes {damage.start} to {damage.stop} are {damage.reason}, and the run has read them whole"
            )
        self.damages += 1
        self.damaged_bytes += damage.stop - damage.start
        self._note(damage.start, damage.stop, DAMAGED, damage.reason)

    def _note(self, start: int, stop: int, outcome: str, reason: str = "") -> None:
        if not self._keeps_ranges or start == stop:
            return
        last = self.ranges[-1] if self.ranges else None
        if last and (last.outcome, last.reason, last.stop) == (outcome, reason, start):
            self.ranges[-1] = Range(last.start, stop, outcome, reason)
        else:
            self.ranges.append(Range(start, stop, outcome, reason))

    def _complain(self, text: str) -> None:
        self.problem_count += 1
        if self.problem_count <= _SHOWN:
            self.problems.append(text)


def account_for(
    shard: Shard, items: Iterable[TarSample | Damage], claims: Iterable[Claims], *, ranges: bool = False
) -> list[PartAccount]:
    """Give every byte of a shard its outcome, in each of several passes.

    Args:
        shard: whose bytes these are.
        items: what it parses to, from its first byte on.
        claims: what is said of it, for each pass.
        ranges: whether to keep the ranges.
    """
    accounts = [PartAccount(each, ranges=ranges) for each in claims]
    digest = shard.digest
    for item in items:
        for account in accounts:
            account.add(item, digest)
    for account in accounts:
        account.close(shard.size)
    return accounts


def begun_parts(position: Position, manifest: Manifest) -> list[Part]:
    """Return the shards that a position has begun, in each of the passes it has begun.

    Raises:
        PositionError: it belongs to another manifest.
    """
    covered = position.covered(manifest)
    turns = position.turn if position.finished else position.turn + 1
    return [
        (shard, turn)
        for turn in range(turns)
        for shard in manifest.of_turn(turn, position.passes, seed=position.seed, covered=covered)
    ]
