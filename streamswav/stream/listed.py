"""The side lists of a run: what was passed over, entry by entry, as the checkpoints' saver wrote it."""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from streamswav.errors import NotFoundError
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import OUTCOMES, PassedOver, Tally
from streamswav.stream.pieces import Part
from streamswav.stream.position import tally_passed
from streamswav.stream.store import Store, join

_LIST_NAME = re.compile(r"/step-(\d+)(?:\.\d+)?\.jsonl$")

IsLeft = Callable[[Part, int], bool]

_NUMBERS = 4


def new_list(store: Store, directory: str, outcome: str, step: int) -> str:
    """Return where the next list of a step goes: a stream's end may add to what the last step wrote."""
    stem = join(directory, outcome, f"step-{step:09d}")
    place = f"{stem}.jsonl"
    for number in itertools.count(2):
        if not store.exists(place):
            break
        place = f"{stem}.{number}.jsonl"
    return place


def find_lists(store: Store, directory: str) -> Iterator[tuple[str, int, str]]:
    """Yield outcome, step and URL of every list of a run.

    Raises:
        StorageError: the folder is out of reach.
    """
    for outcome in OUTCOMES:
        try:
            found = store.list(join(directory, outcome))
        except NotFoundError:
            continue
        for info in found:
            if written := _LIST_NAME.search(info.url):
                yield outcome, int(written[1]), info.url


class SideLists:
    """Entries of many lists, without their keys: some forty bytes each, since there may be millions.

    Attributes:
        damages: every damage once.
        problems: lines that cannot be understood, in words.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._shards = {shard.key: index for index, shard in enumerate(manifest.shards)}
        self._manifest = manifest
        self._parts: dict[Part, array[int]] = {}
        self._labels: list[tuple[str, str]] = []
        self.damages: set[tuple[int, int, int, int, str]] = set()
        self.problems: list[str] = []

    def read(self, name: str, outcome: str, data: bytes) -> None:
        """Take the entries of one list.

        Args:
            name: of the list, for the problems.
            outcome: whose list it is.
            data: a JSON object a line.
        """
        for number, line in enumerate(data.splitlines(), 1):
            try:
                self._take(json.loads(line), outcome)
            except (ValueError, KeyError, TypeError, OverflowError):
                self.problems.append(f"{name}, line {number} cannot be understood")

    def of(self, part: Part) -> list[PassedOver]:
        """Return the entries of a shard in a pass, by ordinal; those that are alike once."""
        numbers = self._parts.get(part, array("Q"))
        rows = {tuple(numbers[at : at + _NUMBERS]) for at in range(0, len(numbers), _NUMBERS)}
        shard, turn = part
        found = []
        for ordinal, start, stop, label in sorted(rows):
            outcome, reason = self._labels[label]
            found.append(PassedOver(shard, turn, reason, start, stop, ordinal=ordinal, outcome=outcome))
        return found

    def add_up(self, is_left: IsLeft) -> tuple[dict[str, tuple[Tally, ...]], Counter[str]]:
        """Return tallies by outcome and source, and samples by reason, of all that is not left.

        A sample that has several entries is one of the problems.
        """
        tallies, reasons = tally_passed(self._not_left(is_left), self._manifest)
        sources = range(len(self._manifest.counts))
        by_outcome = {
            outcome: tuple(by_source.get(source, Tally()) for source in sources)
            for outcome, by_source in tallies.items()
        }
        return by_outcome, reasons

    def _not_left(self, is_left: IsLeft) -> Iterator[PassedOver]:
        for part in self._parts:
            before: PassedOver | None = None
            for each in self.of(part):
                assert each.ordinal is not None
                if is_left(part, each.ordinal):
                    continue
                if before is not None and before.ordinal == each.ordinal:
                    self.problems.append(self._describe_twice(before, each))
                before = each
                yield each

    def _describe_twice(self, one: PassedOver, other: PassedOver) -> str:
        entries: Sequence[PassedOver] = (one, other)
        shown = " and as ".join(
            f"{each.outcome} ({each.reason}, bytes {each.start} to {each.stop})" for each in entries
        )
        return (
            f"{self._manifest.shards[one.shard].key}, pass {one.turn + 1}, sample {one.ordinal} is listed "
            f"as {shown}"
        )

    def _take(self, entry: dict[str, object], outcome: str) -> None:
        shard, turn = self._shards[str(entry["shard"])], _number(entry["turn"])
        start, stop, reason = _number(entry["start"]), _number(entry["stop"]), str(entry["reason"])
        if entry["outcome"] != outcome:
            raise ValueError(outcome)
        if entry["ordinal"] is None:
            self.damages.add((turn, shard, start, stop, reason))
            return
        label = (outcome, reason)
        if label not in self._labels:
            self._labels.append(label)
        row = array("Q", (_number(entry["ordinal"]), start, stop, self._labels.index(label)))
        self._parts.setdefault((shard, turn), array("Q")).extend(row)


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(value)
    return value
