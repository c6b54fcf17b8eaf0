"""What a loader process does for features: shards become batches of images, stretch by stretch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from streamswav.crops import centre_crop
from streamswav.errors import ChangedError, DecodeError, NotFoundError, StreamswavError
from streamswav.processes import Failed
from streamswav.stream.labels import Label, Labels
from streamswav.stream.outcomes import LOST_REASONS, PassedOver
from streamswav.stream.pieces import Piece
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import SampleId, pass_over
from streamswav.stream.select import Selection
from streamswav.stream.store import redact
from streamswav.stream.tar import Damage, TarSample
from streamswav.training.distributed import own_cores
from streamswav.transfer.extraction.preprocessing import Preprocessing
from streamswav.transfer.extraction.stretches import End, Stretch, Task

_MOST_WORKERS = 8

UNLABELLED = "unlabelled"
"""Outcome of a sample without a label, where one is needed."""


def default_workers() -> int:
    """Return how many loader processes a rank has where nobody says: one a core, 8 at most."""
    return min(own_cores(), _MOST_WORKERS)


@dataclass(frozen=True)
class Rows:
    """What is known of N images beside what is computed of them; all of one stretch, in its order."""

    keys: tuple[str, ...] = ()
    ordinals: tuple[int, ...] = ()
    labels: tuple[Label | None, ...] = ()

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.keys + other.keys, self.ordinals + other.ordinals, self.labels + other.labels)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Account:
    """What became of a stretch.

    Attributes:
        samples: that it has.
        passed: numbers of those that are not used, by outcome and reason.
        quarantined: each sample that cannot be used, and each damage.
        end: where it ends.
    """

    samples: int
    passed: Mapping[tuple[str, str], int]
    quarantined: tuple[PassedOver, ...]
    end: End

    @property
    def damages(self) -> Counter[str]:
        """Stretches of bytes that could not be parsed, by reason; they are no samples."""
        return Counter(each.reason for each in self.quarantined if each.ordinal is None)


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images of a stretch.

    Attributes:
        stretch: which.
        pixels: uint8 [B, S, S, 3]; a stretch may end with a batch of none.
        rows: of the images.
        account: of the stretch; only its last batch has it.
    """

    stretch: Stretch
    pixels: Tensor
    rows: Rows
    account: Account | None


@dataclass(frozen=True)
class ImageSource:
    """Shards, and what is done with their samples.

    Attributes:
        reader: opens them.
        preprocessing: of the images.
        labels: tell labels.
        labelled: samples without a label are not used.
        select: which samples are not used.
        samples: of a stretch.
    """

    reader: ShardReader
    preprocessing: Preprocessing
    labels: Labels
    labelled: bool
    select: Selection
    samples: int


@dataclass(frozen=True)
class ImageBatches(IterableDataset["ImageBatch | Failed"]):
    """Gives the batches of the stretches that are to be computed.

    Attributes:
        source: the shards.
        tasks: of each loader process.
        batch: images of a batch; the last one of a stretch may have fewer.
    """

    source: ImageSource
    tasks: Sequence[Sequence[Task]]
    batch: int

    def __iter__(self) -> Iterator[ImageBatch | Failed]:
        worker = get_worker_info()
        try:
            for task in self.tasks[worker.id if worker else 0]:
                yield from self._read(task)
        except StreamswavError as error:
            yield Failed(error)

    def _read(self, task: Task) -> Iterator[ImageBatch]:
        """Read a shard as far as something is wanted."""
        samples = self.source.samples
        number, stop = task.begin()
        ordinal = number * samples
        making = self._begin(task, number)
        for item in self.source.reader.open(Piece(task.shard, 0, stop, ordinal)):
            if task.stop is not None and ordinal >= task.stop:
                break
            if making and (batch := making.add(item)):
                yield batch
            stop = item.stop
            if not isinstance(item, TarSample):
                continue
            ordinal = item.ordinal + 1
            if ordinal % samples == 0:
                if making:
                    yield making.close(End(stop, last=False))
                number = ordinal // samples
                if not task.wants_from(number):
                    return
                making = self._begin(task, number)
        if making:
            yield making.close(End(stop, last=True))

    def _begin(self, task: Task, number: int) -> _Making | None:
        return _Making(Stretch(task.shard, number), self.source, self.batch) if task.wants(number) else None


class _UnusedError(Exception):
    """A sample is not used; the arguments are outcome and reason."""


@dataclass
class _Making:
    """A stretch while it is read."""

    stretch: Stretch
    source: ImageSource
    batch: int
    _pixels: list[Tensor] = field(default_factory=list)
    _rows: list[tuple[str, int, Label | None]] = field(default_factory=list)
    _samples: int = 0
    _passed: Counter[tuple[str, str]] = field(default_factory=Counter)
    _quarantined: list[PassedOver] = field(default_factory=list)

    def add(self, item: TarSample | Damage) -> ImageBatch | None:
        """Take what comes next; return a batch once it is full."""
        if isinstance(item, Damage):
            self._note_damage(item)
            return None
        self._samples += 1
        try:
            self._use(item)
        except _UnusedError as unused:
            self._note(item, *unused.args)
            return None
        return self._take(None) if len(self._rows) == self.batch else None

    def close(self, end: End) -> ImageBatch:
        """Return the last batch."""
        return self._take(Account(self._samples, dict(self._passed), tuple(self._quarantined), end))

    def _use(self, sample: TarSample) -> None:
        source = self.source
        if sample.reason:
            raise _UnusedError("quarantined", sample.reason)
        if verdict := source.select.judge(sample, source.reader.manifest.shards[self.stretch.shard].key):
            raise _UnusedError(*verdict)
        label = self._label(sample)
        try:
            self._pixels.append(_crop(sample, source.preprocessing))
        except DecodeError as error:
            raise _UnusedError("quarantined", error.reason) from None
        self._rows.append((sample.key, sample.ordinal, label))

    def _label(self, sample: TarSample) -> Label | None:
        try:
            return self.source.labels.of(sample.key, sample.members)
        except DecodeError as error:
            if self.source.labelled:
                raise _UnusedError(UNLABELLED, error.reason) from None
            return None

    def _note(self, sample: TarSample, outcome: str, reason: str) -> None:
        self._passed[outcome, reason] += 1
        if outcome == "quarantined":
            identity = SampleId(self.stretch.shard, 0, sample.ordinal)
            self._quarantined.append(pass_over(identity, sample, outcome, reason))

    def _note_damage(self, damage: Damage) -> None:
        shard = self.source.reader.manifest.shards[self.stretch.shard]
        if damage.reason in LOST_REASONS:
            missing = damage.reason == "missing_shard"
            kind, reason = (
                (NotFoundError, "is gone") if missing else (ChangedError, "was replaced by another")
            )
            raise kind(redact(shard.url), f"the shard {reason} since the shards were listed")
        self._quarantined.append(PassedOver(self.stretch.shard, 0, damage.reason, damage.start, damage.stop))

    def _take(self, account: Account | None) -> ImageBatch:
        keys, ordinals, labels = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        pixels = torch.stack(self._pixels) if self._pixels else torch.empty(0, dtype=torch.uint8)
        self._pixels, self._rows = [], []
        return ImageBatch(self.stretch, pixels, Rows(keys, ordinals, labels), account)


def _crop(sample: TarSample, wanted: Preprocessing) -> Tensor:
    if sample.image is None:
        raise DecodeError("no_image")
    return torch.from_numpy(
        centre_crop(
            sample.image,
            resize=wanted.resize,
            crop=wanted.crop,
            max_pixels=wanted.max_pixels,
            exif_orientation=wanted.exif_orientation,
        )
    )
