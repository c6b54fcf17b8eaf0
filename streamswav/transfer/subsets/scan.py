"""One pass over shards that notes which samples subsets are made of: their places, not their bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from streamswav.errors import ChangedError, DecodeError, StreamswavError
from streamswav.processes import Failed, open_loader
from streamswav.stream.key_table import find_key
from streamswav.stream.labels import Label, Labels
from streamswav.stream.outcomes import LOST_REASONS
from streamswav.stream.pieces import Piece
from streamswav.stream.reader import ShardReader
from streamswav.stream.select import Selection
from streamswav.stream.store import redact
from streamswav.stream.tar import Damage, TarSample


class Record(NamedTuple):
    """A sample that may be taken: the least `order` first, which is a hash of seed, shard and ordinal."""

    order: int
    shard: int
    ordinal: int
    start: int
    stop: int
    key: str
    label: Label


@dataclass(frozen=True, eq=False)
class Choice:
    """What a subset takes.

    Attributes:
        per_class: samples of each class; None: all.
        seed: of the draw.
        hashes: uint64, sorted, of the keys that are listed; None: every sample may be taken.
    """

    per_class: int | None
    seed: int
    hashes: NDArray[np.uint64] | None = None


@dataclass
class Picked:
    """What has been picked so far for one choice.

    Attributes:
        choice: what is wanted.
        by_class: samples by class, under 0 all where classes do not matter; a few more than wanted.
        found: the whole key by the place in the list, of what is listed and there.
        ambiguous: places in the list that several samples' keys fit.
        skipped: samples that would be taken but cannot be, and damages, by reason.
    """

    choice: Choice
    by_class: dict[int, list[Record]] = field(default_factory=dict)
    found: dict[int, str] = field(default_factory=dict)
    ambiguous: set[int] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)

    def lists(self, key: str) -> bool:
        """Tell whether a sample of this key may be taken, and note that it is there."""
        if self.choice.hashes is None:
            return True
        place = find_key(self.choice.hashes, key)
        if place < 0:
            return False
        self._note(place, key)
        return True

    def add(self, record: Record) -> None:
        """Take a sample; what is surely too many of its class goes."""
        wanted = self.choice.per_class
        kept = self.by_class.setdefault(0 if wanted is None else _single(record.label), [])
        kept.append(record)
        if wanted is not None and len(kept) > 2 * wanted:
            kept.sort()
            del kept[wanted:]

    def merge(self, other: Picked) -> None:
        """Take what was picked elsewhere."""
        for records in other.by_class.values():
            for record in records:
                self.add(record)
        for place, key in other.found.items():
            self._note(place, key)
        self.ambiguous |= other.ambiguous
        self.skipped += other.skipped

    def close(self) -> list[Record]:
        """Return the samples that are taken, in their order; one that is there twice, once."""
        kept = (sorted(records)[: self.choice.per_class] for records in self.by_class.values())
        records = sorted(record for each in kept for record in each)
        if self.choice.hashes is None:
            return records
        first: dict[str, Record] = {}
        for record in records:
            if record[1:] < first.setdefault(record.key, record)[1:]:
                first[record.key] = record
        return sorted(first.values())

    def _note(self, place: int, key: str) -> None:
        if self.found.setdefault(place, key) != key:
            self.ambiguous.add(place)


def scan(
    reader: ShardReader,
    shards: Sequence[int],
    choices: Sequence[Choice],
    labels: Labels,
    *,
    select: Selection,
    workers: int,
    on_shard: Callable[[], object],
) -> list[Picked]:
    """Go through shards once, for all choices together.

    Args:
        reader: opens them.
        shards: indices in the reader's manifest.
        choices: what is wanted.
        labels: of the samples; those without are not picked.
        select: tells which samples are not trained; these are not picked either.
        workers: processes that read; 0: this one does.
        on_shard: called after each shard.

    Returns:
        What was picked for each choice.

    Raises:
        ChangedError: a shard is gone or was replaced.
        StorageError: one is out of reach.
    """
    picked = [Picked(choice) for choice in choices]
    work = _Scan(reader, tuple(shards), tuple(choices), labels, select)
    with open_loader(work, workers=min(workers, len(shards))) as parts:
        for part in parts:
            if part is None:
                continue
            if isinstance(part, Failed):
                raise part.error
            for whole, one in zip(picked, part, strict=True):
                whole.merge(one)
            on_shard()
    return picked


def order_of(seed: int, shard_key: str, ordinal: int) -> int:
    """Return the number by which samples are drawn: the same on any number of ranks and workers."""
    text = f"{seed}\0{shard_key}\0{ordinal}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, eq=False)
class _Scan(IterableDataset[tuple[Picked, ...] | Failed]):
    """Gives what each shard has to pick from, every n-th shard a worker."""

    reader: ShardReader
    shards: tuple[int, ...]
    choices: tuple[Choice, ...]
    labels: Labels
    select: Selection

    def __iter__(self) -> Iterator[tuple[Picked, ...] | Failed]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for shard in self.shards[first::step]:
                yield self._scan(shard)
        except StreamswavError as error:
            yield Failed(error)

    def _scan(self, shard: int) -> tuple[Picked, ...]:
        picked = tuple(Picked(choice) for choice in self.choices)
        for item in self.reader.open(Piece(shard, turn=0)):
            if isinstance(item, Damage):
                self._refuse_lost(shard, item.reason)
                for each in picked:
                    each.skipped[item.reason] += 1
            else:
                self._offer(shard, item, [each for each in picked if each.lists(item.key)])
        return picked

    def _offer(self, shard: int, sample: TarSample, picked: Sequence[Picked]) -> None:
        if not picked:
            return
        try:
            label = self._label(shard, sample)
        except DecodeError as error:
            for each in picked:
                each.skipped[error.reason] += 1
            return
        name = self.reader.manifest.shards[shard].key
        for each in picked:
            order = order_of(each.choice.seed, name, sample.ordinal)
            each.add(Record(order, shard, sample.ordinal, sample.start, sample.stop, sample.key, label))

    def _label(self, shard: int, sample: TarSample) -> Label:
        if sample.reason:
            raise DecodeError(sample.reason)
        if verdict := self.select.judge(sample, self.reader.manifest.shards[shard].key):
            raise DecodeError(": ".join(verdict) if verdict[0] == "filtered" else verdict[1])
        label = self.labels.of(sample.key, sample.members)
        if sample.image is None:
            raise DecodeError("no_image")
        return label

    def _refuse_lost(self, shard: int, reason: str) -> None:
        """A subset that lacks a shard would be another one each time."""
        if reason in LOST_REASONS:
            url = redact(self.reader.manifest.shards[shard].url)
            raise ChangedError(url, f"{reason} while a subset was drawn; draw it again")


def _single(label: Label) -> int:
    assert isinstance(label, int), "several labels an image are refused before"
    return label
