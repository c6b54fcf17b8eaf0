"""The account of an embedding pass: what became of every sample, held to a budget, and told at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamswav.config import StreamSection
from streamswav.errors import BudgetSpentError, DataError
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.telemetry.progress import Reporter
from streamswav.transfer.extraction.part_folder import Record
from streamswav.transfer.extraction.parts import Part
from streamswav.transfer.extraction.reading import Account
from streamswav.transfer.extraction.stretches import End, Stretch, list_tasks

OUTCOMES = ("quarantined", "excluded", "filtered")

_SHOWN = 3


@dataclass(frozen=True)
class Summary:
    """What is kept of a part."""

    stretch: Stretch
    images: int
    end: End
    quarantined: bool


@dataclass
class Totals:
    """Sums over parts.

    Attributes:
        images: that are embedded.
        samples: that the parts have.
        passed: those that are not embedded, by outcome and reason.
        damages: stretches of bytes that could not be parsed, by reason; they are no samples.
        damaged_bytes: their bytes.
    """

    images: int = 0
    samples: int = 0
    passed: Counter[tuple[str, str]] = field(default_factory=Counter)
    damages: Counter[str] = field(default_factory=Counter)
    damaged_bytes: int = 0

    def add(self, images: int, account: Account) -> None:
        """Add a part."""
        self.images += images
        self.samples += account.samples
        self.passed.update(account.passed)
        self.damages.update(account.damages)
        self.damaged_bytes += sum(
            each.stop - each.start for each in account.quarantined if each.ordinal is None
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.images + other.images,
            self.samples + other.samples,
            self.passed + other.passed,
            self.damages + other.damages,
            self.damaged_bytes + other.damaged_bytes,
        )

    def count(self, outcome: str) -> int:
        """Return the samples of an outcome."""
        return sum(count for (each, _), count in self.passed.items() if each == outcome)

    def balance(self) -> str:
        """Return the account in words.

        Raises:
            DataError: it does not add up.
        """
        parts = [f"{self.images:,} embedded"]
        parts += [f"{self.count(outcome):,} {outcome}" for outcome in OUTCOMES]
        if self.images + self.passed.total() != self.samples:
            raise DataError(f"{' + '.join(parts)} are not the {self.samples:,} samples that were read")
        damages = f"; {self.damages.total():,} damaged stretches" if self.damages else ""
        return f"{' + '.join(parts)} = {self.samples:,} samples{damages}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        passed: dict[str, dict[str, int]] = {outcome: {} for outcome in OUTCOMES}
        for (outcome, reason), count in sorted(self.passed.items()):
            passed[outcome][reason] = count
        return {
            "images": self.images,
            "samples": self.samples,
            **passed,
            "damages": dict(sorted(self.damages.items())),
        }


@dataclass(frozen=True)
class Told:
    """What a rank tells the others: sums over its parts, the latest it could not use, images on the way."""

    totals: Totals
    evidence: tuple[str, ...]
    computed: int


class EmbedAccount:
    """Hears of the parts of a rank, and of what other ranks tell of theirs.

    Args:
        manifest: the shards.
        section: its `skip_ratio` of samples may be quarantined, looked at after `skip_probation`.
        reporter: is told how far all ranks are.
        seconds: between two such lines.
        alive: called now and then.

    Attributes:
        parts: of this rank.
        totals: over them.
        images: that this rank has computed.
        found_parts: of them, those that were there before.
    """

    def __init__(
        self,
        manifest: Manifest,
        section: StreamSection,
        reporter: Reporter,
        *,
        seconds: float,
        alive: Callable[[], None],
    ) -> None:
        self._manifest, self._section, self._reporter = manifest, section, reporter
        self._seconds, self._alive, self._last = seconds, alive, time.monotonic()
        self._evidence: list[str] = []
        self.parts: list[Summary] = []
        self.totals = Totals()
        self.images = self.found_parts = 0

    def found(self, record: Record, _: Mapping[str, bytes]) -> None:
        """Hear of a part that was there before."""
        self.found_parts += 1
        self._add(record.stretch, record.images, record.account)

    def computed(self, part: Part) -> None:
        """Hear of a part that is new."""
        self._add(part.stretch, len(part.rows), part.account)

    def on_batch(self, images: int) -> None:
        """Count images."""
        self.images += images
        if images:
            self._alive()

    def facts(self) -> Told:
        """Return what the other ranks are told."""
        return Told(self.totals, tuple(self._evidence), self.images)

    def on_facts(self, facts: Sequence[Told]) -> None:
        """Hold all ranks' sums to the budget, and say how far they are every few seconds.

        Raises:
            BudgetSpentError: more is quarantined than the budget allows.
        """
        totals = sum((each.totals for each in facts), Totals())
        self._check(totals, [text for each in facts for text in each.evidence])
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            images = sum(each.computed for each in facts)
            text = f"{images:,} images computed, {totals.images:,} written or on their way"
            self._reporter.event("embed", text, images=images, written=totals.images)

    def _add(self, stretch: Stretch, images: int, account: Account) -> None:
        self.totals.add(images, account)
        self.parts.append(Summary(stretch, images, account.end, bool(account.quarantined)))
        latest = [*self._evidence, *(self._describe(each) for each in account.quarantined[-_SHOWN:])]
        self._evidence = latest[-_SHOWN:]

    def _describe(self, each: PassedOver) -> str:
        key = f" {each.key}" if each.key else ""
        return f"{self._manifest.shards[each.shard].key}[{each.start}:{each.stop}]{key}: {each.reason}"

    def _check(self, totals: Totals, evidence: Sequence[str]) -> None:
        ratio, damages = self._section.skip_ratio, totals.damages.total()
        seen = totals.samples + damages
        if seen < self._section.skip_probation:
            return
        skipped = totals.count("quarantined") + damages
        allowed = f"more than stream.skip_ratio = {ratio} allows; the latest: {'; '.join(evidence[-_SHOWN:])}"
        if skipped > ratio * seen:
            raise BudgetSpentError(f"{skipped:,} of {seen:,} samples could not be used, {allowed}")
        if totals.damaged_bytes > ratio * self._manifest.size:
            raise BudgetSpentError(f"{totals.damaged_bytes:,} bytes of the shards are damaged, {allowed}")


def check_whole(parts: Sequence[Summary], manifest: Manifest) -> None:
    """Make sure that every stretch of every shard is there, once.

    Raises:
        DataError: one is not.
    """
    ends = {each.stretch: each.end for each in parts}
    if len(ends) != len(parts) or list_tasks(ends, stops=[None] * len(manifest.shards)):
        raise DataError("the parts are not those of the shards, each once; this is a defect of the program")
