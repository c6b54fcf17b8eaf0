"""A checkpoint against its baselines: one pass over the images for all of them, and for all protocols."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamswav.config import CropsSection, StorageSection
from streamswav.errors import ConfigError
from streamswav.models import Trunk
from streamswav.stream.manifest import list_manifest
from streamswav.stream.store import Store, redact
from streamswav.telemetry.progress import Reporter
from streamswav.transfer.features import Features, Preprocessing, extract
from streamswav.transfer.knn import KnnSettings, measure_knn
from streamswav.transfer.linear import PROTOCOL, LinearSettings, measure_linear
from streamswav.transfer.results import DataUsed, Results, Value, to_value
from streamswav.transfer.weights import TrunkInfo, open_trunk, untrained_trunk

PROTOCOLS = ("knn", "linear")
BASELINES = ("untrained", "pixels")

_SMALL_IMAGE = 64
_PIXELS_EDGE = 32
_MOST_WORKERS = 8
_REPORT_SECONDS = 10.0
_KNN = KnnSettings()
_LINEAR = LinearSettings()
_STORAGE = StorageSection()


def evaluate(
    checkpoint: str,
    train: Sequence[str],
    test: Sequence[str],
    *,
    protocols: Sequence[str] = PROTOCOLS,
    baselines: Sequence[str] = (),
    knn: KnnSettings = _KNN,
    linear: LinearSettings = _LINEAR,
    resize: int | None = None,
    crop: int | None = None,
    limit: int | None = None,
    batch: int = 256,
    workers: int | None = None,
    device: str = "auto",
    storage: StorageSection = _STORAGE,
    reporter: Reporter | None = None,
) -> Results:
    """Measure a checkpoint and its baselines.

    Args:
        checkpoint: folder of a run or of a checkpoint.
        train: labelled shards that neighbours and classifiers come from.
        test: labelled shards that are classified.
        protocols: of `PROTOCOLS`.
        baselines: of `BASELINES`: the trunk as the run began it; the pixels, at most 32 x 32 of them.
        knn: how neighbours vote.
        linear: how the linear classifier is trained.
        resize: shorter side in pixels; by default 256/224 of the crop, or the crop itself below 64 pixels.
        crop: centre crop in pixels; by default the first of the run's crop sizes.
        limit: use only about so many images of each set.
        batch: images through the trunk at once.
        workers: processes that decode; by default one a core, 8 at most.
        device: auto, cpu or cuda.
        storage: fields that are set here override those of the run's configuration.
        reporter: is told how far it is.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: settings that cannot work.
        DataError: the shards hold no labelled images.
        StorageError: a location that cannot be read.
    """
    trunk, info = open_trunk(checkpoint, storage=storage)
    wanted = choose_preprocessing(info.config.crops, resize=resize, crop=crop)
    columns = _columns(trunk, info, baselines, edge=min(wanted.crop, _PIXELS_EDGE))
    where = _device(device)
    own_storage = info.config.storage.model_copy(update=storage.model_dump(exclude_unset=True))
    if "knn" in protocols:
        _check_neighbours(knn, train, Store(own_storage), limit=limit)

    def read(role: str, urls: Sequence[str]) -> Features:
        return extract(
            _SideBySide(columns.values()),
            urls,
            preprocessing=wanted,
            storage=own_storage,
            workers=_default_workers() if workers is None else workers,
            batch=batch,
            device=where,
            limit=limit,
            on_images=_progress(reporter, role),
        )

    learnt = read("train", train)
    if "knn" in protocols:
        _fit_neighbours(knn, len(learnt.labels), reporter)
    asked = read("test", test)
    labels = index_classes(learnt.labels, asked.labels)
    values: list[Value] = []
    begin = 0
    for column, module in columns.items():
        own = slice(begin, begin + module.feature_dim)
        begin = own.stop
        sets = (learnt.features[:, own], asked.features[:, own])
        values += _measure(column, sets, labels, protocols=protocols, knn=knn, linear=linear, device=where)
    data = {"train": _used(learnt, train), "test": _used(asked, test)}
    seeds = {"untrained": info.config.stream.seed, "linear": linear.seed}
    return Results(_describe(info, trunk.feature_dim), data, asdict(wanted), seeds, values)


def choose_preprocessing(
    crops: CropsSection, *, resize: int | None = None, crop: int | None = None
) -> Preprocessing:
    """Complete what is not given from a run's crops, and normalise as the run did.

    Raises:
        ConfigError: a crop larger than the resized image.
    """
    crop = crop or crops.sizes[0]
    resize = resize or (crop if crop < _SMALL_IMAGE else round(crop * 256 / 224))
    if resize < crop:
        raise ConfigError("--resize", f"smaller than the crop ({crop})", value=resize)
    return Preprocessing(resize, crop, crops.mean, crops.std, crops.max_pixels, crops.exif_orientation)


class RawPixels(nn.Module):
    """Takes the place of a trunk: the pixels themselves, from 0 to 1, as features.

    Args:
        edge: larger images are brought to this many pixels a side.
        mean: of the normalisation that is undone.
        std: likewise.

    Attributes:
        feature_dim: F = 3 * edge * edge, for images of at least that size.
    """

    def __init__(self, edge: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._edge, self.feature_dim = edge, 3 * edge * edge
        self._mean, self._std = (torch.tensor(each)[:, None, None] for each in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images [B, 3, S, S] as [B, F]."""
        plain = images * self._std.to(images.device) + self._mean.to(images.device)
        size = (self._edge, self._edge)
        return F.interpolate(plain, size=size, mode="bilinear", antialias=True).flatten(1)


def index_classes(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, int]:
    """Number the classes that occur in training from 0, whatever their labels.

    Args:
        train: labels [N].
        test: labels [M].

    Returns:
        Classes [N], classes [M] (-1 for a label that no training image has), and their number.
    """
    names, classes = torch.unique(train, return_inverse=True)
    places = torch.searchsorted(names, test).clamp(max=len(names) - 1)
    return classes, places.where(names[places] == test, -1), len(names)


class _SideBySide(nn.Module):
    """Several modules on the same images, their features joined: images are read and decoded once."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([part(images) for part in self.parts], dim=1)


def _check_neighbours(knn: KnnSettings, urls: Sequence[str], store: Store, *, limit: int | None) -> None:
    """Refuse a k that is larger than what the shards' producers counted, before any image is read."""
    counted = list_manifest(urls, store).samples
    if counted is not None:
        knn.fit(counted if limit is None else min(counted, limit))


def _fit_neighbours(knn: KnnSettings, images: int, reporter: Reporter | None) -> None:
    """Refuse, or tell of, each k that the images are too few for; the test images are still to be read."""
    used, left_out = knn.fit(images), knn.left_out(images)
    if left_out and reporter:
        names = [", ".join(map(str, group)) for group in (left_out, used)]
        text = f"k = {names[0]} is left out, k = {names[1]} is used: there are only {images} training images"
        reporter.event("neighbours", text, images=images)


def _columns(
    trunk: Trunk, info: TrunkInfo, baselines: Sequence[str], *, edge: int
) -> dict[str, Trunk | RawPixels]:
    columns: dict[str, Trunk | RawPixels] = {"checkpoint": trunk}
    if "untrained" in baselines:
        columns["untrained"] = untrained_trunk(info.config, info.config.stream.seed)
    if "pixels" in baselines:
        crops = info.config.crops
        columns["pixels"] = RawPixels(edge, mean=crops.mean, std=crops.std)
    return columns


def _measure(
    column: str,
    features: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor, int],
    *,
    protocols: Sequence[str],
    knn: KnnSettings,
    linear: LinearSettings,
    device: torch.device,
) -> Iterator[Value]:
    train_labels, test_labels, classes = labels
    sets = (features[0], train_labels, features[1], test_labels)
    if "knn" in protocols:
        found = measure_knn(*sets, classes=classes, settings=knn, device=device)
        for vote, measured in found.items():
            name = f"kNN, k = {vote.k}"
            if len(knn.temperatures) > 1:
                name += f", T = {vote.temperature:g}"
            yield to_value(name, {**vote._asdict(), "similarity": "cosine"}, column, measured)
    if "linear" in protocols:
        accuracy = measure_linear(*sets, classes=classes, settings=linear, device=device)
        settings = {**asdict(linear), "reported": "last epoch", "features": PROTOCOL}
        yield to_value("linear", settings, column, accuracy)


def _describe(info: TrunkInfo, features: int) -> dict[str, object]:
    model = info.config.model
    return {
        "trunk": model.trunk,
        "width": model.width,
        "stem": model.stem,
        "features": features,
        "checkpoint": info.url,
        "step": info.step,
        "images": info.images,
    }


def _used(features: Features, urls: Sequence[str]) -> DataUsed:
    shown = [redact(url) for url in urls]
    return DataUsed(shown, len(features.labels), len(set(features.labels.tolist())), features.skipped)


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device", "there is no CUDA device here", value=name)
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _default_workers() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def _progress(reporter: Reporter | None, what: str) -> Callable[[int], None]:
    """Speak up every few seconds only."""
    last = time.monotonic()

    def tell(images: int) -> None:
        nonlocal last
        if reporter and time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            reporter.event("features", f"{what}: {images:,} images", images=images)

    return tell
