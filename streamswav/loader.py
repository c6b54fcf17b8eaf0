"""Stream x crops -> batches: what a loader process does."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import IterableDataset, get_worker_info

from streamswav.crops import Crops, MultiCrop, collate
from streamswav.errors import ConfigError, DecodeError, StreamswavError
from streamswav.processes import Failed
from streamswav.stream.labels import Label, Labels
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import PassedOver, Tally, tally_one
from streamswav.stream.pieces import Cursor
from streamswav.stream.plan import Plan
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader, Sample, SampleId, pass_over
from streamswav.stream.select import Selection
from streamswav.stream.tar import TarSample
from streamswav.telemetry.families import WORKER_STATES

HOPELESS = 10_000
UNLABELLED = ("no_label", "other_split")
"""Why a sample has no label, where that is no fault of it: it is filtered, not quarantined."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        number: t, the batch's number in its generation.
        pixels: a tensor for each resolution, uint8 [crops, B, S, S, 3].
        parameters: of the augmentation, float32 [all crops, B, P], on the CPU.
        ids: B identities.
        keys: B names, for people.
        spans: B stretches in their shards: first byte, and the byte after the last.
        cursors: where the lanes are after this batch.
        sample_bytes: bytes of the samples in their shards.
        trained: tallies of the samples by source.
        quarantined: what could not be used on the way.
        passed: what was excluded or filtered on the way.
        seconds: time spent by stage (fetch, parse, decode, crop, collate).
        traffic: (outcome, bytes received) of the storage requests made meanwhile.
        labels: class numbers, int64 [B], or of several labels an image 0 and 1, float32 [B, C]; None: no
            labels are read.
    """

    number: int
    pixels: tuple[torch.Tensor, ...]
    parameters: torch.Tensor
    ids: tuple[SampleId, ...]
    keys: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    cursors: Mapping[int, Cursor]
    sample_bytes: int
    trained: Mapping[int, Tally]
    quarantined: tuple[PassedOver, ...]
    passed: tuple[PassedOver, ...]
    seconds: Mapping[str, float]
    traffic: tuple[tuple[str, int], ...]
    labels: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """Copy the pixels to page-locked memory; the DataLoader calls this."""
        return replace(self, pixels=tuple(each.pin_memory() for each in self.pixels))

    def as_skipped(self) -> list[PassedOver]:
        """Return the samples as what is passed over because their step was not finite."""
        return [
            PassedOver(each.shard, each.turn, "nonfinite", *span, key, each.ordinal, "skipped_step")
            for each, key, span in zip(self.ids, self.keys, self.spans, strict=True)
        ]


@dataclass(frozen=True)
class Exhausted:
    """Lanes could not fill their share of a batch: this generation is over.

    Attributes:
        passed_over: what these lanes passed over meanwhile, to their end. What others did is left out: how
            far they came is no fact of the plan but of the ranks.
    """

    passed_over: tuple[PassedOver, ...]


Item = Batch | Exhausted | Failed


@dataclass(frozen=True)
class LaneBatches(IterableDataset[Item]):
    """The batches that a rank takes from a plan, dealt over its loader processes.

    Worker w of K gives the batches t = first + w (mod K), so that the DataLoader's round robin restores the
    order. A sample that is not to be trained, or cannot be decoded, is replaced by the next one of its lane.

    Attributes:
        plan: what is read.
        cursors: where its lanes are; a lane that is missing starts at its beginning.
        first: number of the first batch.
        columns: of the grid, those that belong to this rank.
        manifest: the shards.
        reader: opens them.
        select: what is not trained.
        crop: makes crops.
        labels: tells the samples' labels; None: nobody asks for them.
    """

    plan: Plan
    cursors: Mapping[int, Cursor]
    first: int
    columns: range
    manifest: Manifest
    reader: ShardReader
    select: Selection
    crop: MultiCrop
    labels: Labels | None = None
    _lanes: dict[int, LaneReader] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        mine, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = {
            (self.first + mine + turn * step) % self.plan.grid.rows for turn in range(self.plan.grid.rows)
        }
        try:
            self.reader.share_among(len(rows) * len(self.columns), self.plan.grid.window)
            for number in itertools.count(self.first + mine, step):
                self._tell(busy=True)
                item = self._assemble(number)
                self._tell(busy=False)
                yield item
                if isinstance(item, Exhausted):
                    return
        except StreamswavError as error:
            yield Failed(error)

    def _tell(self, *, busy: bool) -> None:
        """Tell what this loader process does; a rank that reads for itself is none."""
        if get_worker_info() is not None:
            self.reader.metrics.choose("dataloader_workers", "busy" if busy else "waiting", WORKER_STATES)

    def _assemble(self, number: int) -> Batch | Exhausted:
        """Fill every column's share of one batch."""
        began, fetched = time.perf_counter(), self.reader.fetch_seconds
        share = _Share()
        lanes = [self.plan.grid.lane(number % self.plan.grid.rows, column) for column in self.columns]
        self._open_lanes(lanes)
        exhausted, ended = False, list[PassedOver]()
        for lane in lanes:
            before = len(share.passed_over)
            if not self._fill(share, self._lanes[lane], len(share.taken) + self.plan.grid.share):
                exhausted = True
                ended += share.passed_over[before:]
        if exhausted:
            return Exhausted(tuple(ended))
        started = time.perf_counter()
        pixels, parameters = collate(share.crops)
        now, fetching = time.perf_counter(), self.reader.fetch_seconds - fetched
        parsing = started - began - share.decoding - share.cropping - fetching
        seconds = {
            "fetch": fetching,
            "parse": max(0.0, parsing),
            "decode": share.decoding,
            "crop": share.cropping,
            "collate": now - started,
        }
        for stage, spent in seconds.items():
            self.reader.metrics.add("stage_seconds_total", spent, stage)
        return Batch(
            number=number,
            pixels=pixels,
            parameters=parameters,
            ids=tuple(sample.id for sample in share.taken),
            keys=tuple(sample.key for sample in share.taken),
            spans=tuple((sample.start, sample.stop) for sample in share.taken),
            cursors={lane: self._lanes[lane].cursor for lane in lanes},
            sample_bytes=sum(sample.stop - sample.start for sample in share.taken),
            trained=self._tally(share.taken),
            quarantined=tuple(each for each in share.passed_over if each.outcome == "quarantined"),
            passed=tuple(each for each in share.passed_over if each.outcome != "quarantined"),
            seconds=seconds,
            traffic=tuple(self.reader.take_traffic()),
            labels=_stack(share.labels, self.labels) if self.labels is not None else None,
        )

    def _fill(self, share: _Share, reader: LaneReader, want: int) -> bool:
        """Take samples of a lane until there are `want`; False where it holds no more."""
        while len(share.taken) < want and (sample := next(reader, None)) is not None:
            tried = self._try(sample, share)
            if isinstance(tried, PassedOver):
                share.passed_over.append(tried)
                self._refuse_hopeless(share.passed_over)
            else:
                crops, label = tried
                share.crops.append(crops)
                share.labels.append(label)
                share.taken.append(replace(sample, members={}, image=None))
        share.passed_over += reader.take_damages()
        return len(share.taken) == want

    def _try(self, sample: Sample, share: _Share) -> tuple[Crops, Label] | PassedOver:
        """Return a sample's crops and label, or why it is not used."""
        verdict = self.select.judge(sample, self.manifest.shards[sample.id.shard].key)
        if verdict is not None:
            return pass_over(sample.id, sample, *verdict)
        label = read_label(self.labels, sample)
        if isinstance(label, Unlabelled):
            return pass_over(sample.id, sample, label.outcome, label.reason)
        started = time.perf_counter()
        try:
            crops = self._crop(sample)
        except DecodeError as error:
            share.decoding += time.perf_counter() - started
            return pass_over(sample.id, sample, "quarantined", error.reason)
        share.decoding += crops.decode_seconds
        share.cropping += time.perf_counter() - started - crops.decode_seconds
        return crops, label

    def sift(self) -> list[PassedOver]:
        """Return what a batch would pass over of all that the plan's only lane holds; nothing is kept."""
        self.reader.share_among(1, self.plan.grid.window)
        self._open_lanes([0])
        lane = self._lanes[0]
        tried = (self._try(sample, _Share()) for sample in lane)
        found = [each for each in tried if isinstance(each, PassedOver)]
        return found + lane.take_damages()

    def _refuse_hopeless(self, passed: Sequence[PassedOver]) -> None:
        """A condition with a slip of the pen lets nothing through: say so before the whole bucket is read.

        Raises:
            ConfigError: so many samples of a new run met no condition before its first batch was filled.
        """
        begun = self.first or self.plan.generation or self.plan.turn
        if begun or len(passed) != HOPELESS or any(each.outcome != "filtered" for each in passed):
            return
        none, last = f"none of the first {len(passed):,} samples of a worker", passed[-1]
        if self.labels is not None and last.reason in UNLABELLED:
            key = "labels.member" if self.labels.table is None else "labels.file"
            raise ConfigError(key, f"{none} has a label; {self.labels.needed}; the last: {last.key}")
        raise ConfigError("stream.where", f"{none} meets it; the last: {last.key} ({last.reason})")

    def _tally(self, taken: Sequence[Sample]) -> dict[int, Tally]:
        tallies: defaultdict[int, Tally] = defaultdict(Tally)
        for sample in taken:
            shard, identity = self.manifest.shards[sample.id.shard], sample.id
            tallies[shard.source] += tally_one(
                self.reader.digest(identity.shard),
                identity.turn,
                identity.ordinal,
                sample.start,
                sample.stop,
            )
        return dict(tallies)

    def _open_lanes(self, lanes: Sequence[int]) -> None:
        """Lanes open when their row comes first; all of a row ask for what they need next at once."""
        for lane in lanes:
            if lane not in self._lanes:
                cursor = self.cursors.get(lane)
                reader = LaneReader(self.plan, lane, self.reader.open, cursor, shelf=self.reader.shelf)
                self._lanes[lane] = reader
                if piece := reader.next_piece:
                    self.reader.begin(piece)
            self._lanes[lane].ask(self.plan.grid.share)

    def _crop(self, sample: Sample) -> Crops:
        if sample.image is None:
            raise DecodeError("no_image", sample.key)
        shard = self.reader.digest(sample.id.shard)
        return self.crop(sample.image, key=(sample.id.turn, shard, sample.id.ordinal))


@dataclass(frozen=True)
class Unlabelled:
    """Why a sample has no label. That there is none is not the sample's fault; one that is wrong is."""

    reason: str

    @property
    def outcome(self) -> str:
        """What becomes of the sample."""
        return "filtered" if self.reason in UNLABELLED else "quarantined"


def read_label(labels: Labels | None, sample: Sample | TarSample) -> Label | Unlabelled:
    """Return the label of a sample; 0 where nobody asks for labels."""
    if labels is None:
        return 0
    try:
        return labels.of(sample.key, sample.members)
    except DecodeError as error:
        return Unlabelled(error.reason)


def _stack(labels: Sequence[Label], among: Labels) -> torch.Tensor:
    """Make one tensor of the labels of a batch: numbers [B], or of several an image 0, 1 and -1 [B, C]."""
    if not among.multi:
        return torch.tensor(labels, dtype=torch.int64)
    assert among.classes is not None
    wanted = torch.zeros(len(labels), among.classes)
    for row, classes in zip(wanted, labels, strict=True):
        assert isinstance(classes, tuple)
        row[[number for number in classes if number >= 0]] = 1
        row[[~number for number in classes if number < 0]] = -1
    return wanted


@dataclass
class _Share:
    """A rank's share of a batch while it is filled, and the seconds spent on decoding and on crops."""

    taken: list[Sample] = field(default_factory=list)
    crops: list[Crops] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)
    decoding: float = 0.0
    cropping: float = 0.0
