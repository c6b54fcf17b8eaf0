"""Features of labelled images: one exact pass over tar shards, every image once, in the shards' order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from streamswav.config import StorageSection
from streamswav.crops import centre_crop, normalise
from streamswav.errors import DataError, DecodeError, NonFiniteError, StreamswavError
from streamswav.processes import Failed, open_loader
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.pieces import Piece
from streamswav.stream.plan import Plan, deal, split_pieces
from streamswav.stream.reader import ShardReader
from streamswav.stream.redaction import is_tombstone
from streamswav.stream.samples import LaneReader, Sample
from streamswav.stream.store import Store

_WINDOW = 16


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image of an evaluation.

    Attributes:
        resize: length of the shorter side in pixels.
        crop: S, edge of the square that is then cut from the centre.
        mean: of the normalisation, by channel, of 0 to 1.
        std: of the normalisation.
        max_pixels: larger images are skipped undecoded.
        exif_orientation: turn images by their EXIF orientation.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_pixels: int
    exif_orientation: bool = False


@dataclass(frozen=True)
class Features:
    """Features of N images, sorted by shard and place in the shard.

    Attributes:
        features: float32 [N, F] on the CPU, as they leave the trunk (not normalised).
        labels: int64 [N].
        keys: N names.
        skipped: samples and unreadable stretches that were not used, by reason.
    """

    features: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    skipped: Mapping[str, int]


@torch.no_grad()
def extract(
    trunk: nn.Module,
    urls: Sequence[str],
    *,
    preprocessing: Preprocessing,
    storage: StorageSection,
    workers: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    on_images: Callable[[int], None] = lambda _: None,
) -> Features:
    """Compute the features of every labelled image once.

    The result does not depend on `workers`, except for rounding.

    Args:
        trunk: images [B, 3, S, S] to features [B, F]; moved to `device`, used in the mode it is in.
        urls: labelled shards, in any form that the training's `stream.urls` may have.
        preprocessing: of the images.
        storage: how object storage is reached.
        workers: processes that read and decode; 0: this one does.
        batch: images through the trunk at once.
        device: of the trunk.
        limit: use only about so many images, the first ones of every shard.
        on_images: called with the number of images done so far, after each batch.

    Raises:
        DataError: no sample has a label and an image that can be decoded.
        NonFiniteError: the trunk gives features that are not numbers.
        ManifestError, StorageError: the shards cannot be found or read.
    """
    manifest = list_manifest(urls, Store(storage))
    reader = ShardReader(manifest, storage, read_ahead=2)
    plan = _deal(manifest, lanes=max(1, workers), limit=limit)
    trunk = trunk.to(device)
    collected = _Collected()
    with open_loader(_LabelledBatches(plan, reader, preprocessing, batch), workers=workers) as parts:
        for part in parts:
            if part is None:
                continue
            if isinstance(part, Failed):
                raise part.error
            collected.skipped.update(part.skipped)
            if part.keys:
                images = normalise(part.pixels.to(device), mean=preprocessing.mean, std=preprocessing.std)
                collected.add(part, trunk(images).float().cpu())
                on_images(len(collected.keys))
    return collected.sort()


@dataclass(frozen=True)
class _Part:
    """A batch of one worker: uint8 [B, S, S, 3], and for each image its label, key and place."""

    pixels: Tensor
    labels: tuple[int, ...]
    keys: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class _LabelledBatches(IterableDataset[_Part | Failed]):
    """Reads one lane of the plan a worker; a label or an image that cannot be used is counted."""

    plan: Plan
    reader: ShardReader
    preprocessing: Preprocessing
    batch: int

    def __iter__(self) -> Iterator[_Part | Failed]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        lane = LaneReader(self.plan, number, self.reader.open, shelf=self.reader.shelf)
        try:
            while part := self._assemble(lane):
                yield part
        except StreamswavError as error:
            yield Failed(error)

    def _assemble(self, lane: LaneReader) -> _Part | None:
        """Fill a batch as far as the lane goes; None once it has nothing more to tell."""
        pixels: list[Tensor] = []
        labels: list[int] = []
        taken: list[Sample] = []
        skipped: Counter[str] = Counter()
        while len(taken) < self.batch and (sample := next(lane, None)) is not None:
            try:
                label = _read_label(sample)
                pixels.append(self._crop(sample))
            except DecodeError as error:
                skipped[error.reason] += 1
            else:
                labels.append(label)
                taken.append(sample)
        skipped.update(damage.reason for damage in lane.take_damages())
        if not taken and not skipped:
            return None
        return _Part(
            torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8),
            tuple(labels),
            tuple(sample.key for sample in taken),
            tuple((sample.id.shard, sample.id.ordinal) for sample in taken),
            skipped,
        )

    def _crop(self, sample: Sample) -> Tensor:
        if sample.image is None:
            raise DecodeError("no_image")
        wanted = self.preprocessing
        return torch.from_numpy(
            centre_crop(
                sample.image,
                resize=wanted.resize,
                crop=wanted.crop,
                max_pixels=wanted.max_pixels,
                exif_orientation=wanted.exif_orientation,
            )
        )


@dataclass
class _Collected:
    """What has come from the workers, in the order of its arrival."""

    features: deque[Tensor] = field(default_factory=deque)
    labels: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, part: _Part, features: Tensor) -> None:
        self.features.append(features)
        self.labels += part.labels
        self.keys += part.keys
        self.places += part.places

    def sort(self) -> Features:
        """Bring all to the shards' order; every batch is let go as soon as its rows are placed."""
        if not self.keys:
            raise DataError(_explain_nothing(self.skipped))
        ordinals, shards = np.array(self.places).T[::-1]
        order = np.lexsort((ordinals, shards))
        rank = torch.from_numpy(np.argsort(order))
        sorted_features = torch.empty(len(rank), self.features[0].shape[1])
        begin = 0
        while self.features:
            part = self.features.popleft()
            if not part.isfinite().all():
                raise NonFiniteError("the trunk gives features that are not finite; its training diverged")
            sorted_features[rank[begin : begin + len(part)]] = part
            begin += len(part)
        labels = torch.tensor(self.labels)[torch.from_numpy(order)]
        keys = tuple(self.keys[index] for index in order)
        return Features(sorted_features, labels, keys, dict(sorted(self.skipped.items())))


def _deal(manifest: Manifest, *, lanes: int, limit: int | None) -> Plan:
    """Deal the shards to the workers, cutting them by stride where there are few."""
    sizes = [shard.size for shard in manifest.shards]
    pieces = [Piece(index, turn=0) for index in range(len(sizes))]
    if limit is not None:
        pieces = _first_ones(limit, shards=len(sizes))
    pieces, piece_sizes = split_pieces(pieces, sizes, lanes=lanes)
    grid = Grid(batch=lanes, columns=lanes, rows=1, window=_WINDOW)
    return deal(pieces, piece_sizes, grid=grid, seed=0, turn=0, generation=0)


def _first_ones(limit: int, *, shards: int) -> list[Piece]:
    """Name the first samples of every shard, as evenly as `limit` allows."""
    shares = ((index + 1) * limit // shards - index * limit // shards for index in range(shards))
    return [Piece(index, turn=0, done=~((1 << share) - 1)) for index, share in enumerate(shares) if share]


def _read_label(sample: Sample) -> int:
    label = sample.label
    if label is None:
        raise DecodeError("redacted" if is_tombstone(sample.members) else "no_label")
    if not isinstance(label, int) or label < 0:
        raise DecodeError("label_not_a_class_number")
    return label


def _explain_nothing(skipped: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are no samples"
    needed = "a labelled sample has a .cls member that holds its class number, as webdataset writes it"
    return f"no image to evaluate with ({counts}); {needed}"
