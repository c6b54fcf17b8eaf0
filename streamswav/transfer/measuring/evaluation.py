"""A trunk against its baselines: one pass over the images for all of them, and for all protocols."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch

from streamswav.config import LabelsSection, StorageSection
from streamswav.errors import DrainedError, NonFiniteError
from streamswav.models import Trunk
from streamswav.stream.labels import Labels, load_labels
from streamswav.stream.manifest import list_manifest
from streamswav.stream.store import Store, join
from streamswav.telemetry.progress import Reporter
from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction.collected import Features
from streamswav.transfer.extraction.features import extract, gather_features
from streamswav.transfer.extraction.preprocessing import Preprocessing, choose_preprocessing
from streamswav.transfer.extraction.reading import default_workers
from streamswav.transfer.extraction.together import Together
from streamswav.transfer.measuring.baselines import SideBySide, make_columns
from streamswav.transfer.measuring.knn import KnnSettings, measure_knn
from streamswav.transfer.measuring.labelled_sets import (
    describe_set,
    flat_places,
    number_classes,
)
from streamswav.transfer.measuring.linear import LinearSettings, measure_linear
from streamswav.transfer.measuring.protocols import knn_values, linear_values, svm_value
from streamswav.transfer.measuring.results import Results, Value
from streamswav.transfer.measuring.svm import SvmSettings, check_svm, measure_svm
from streamswav.transfer.weights.trunks import TrunkInfo, open_alike, open_trunk

PROTOCOLS = ("knn", "linear", "svm")

_REPORT_SECONDS = 10.0
_PART = 8192
_ALONE = Ranks()
_STORAGE = StorageSection()
_LABELS = LabelsSection()


@dataclass(frozen=True)
class Wanted:
    """What is measured, and how.

    Attributes:
        protocols: of `PROTOCOLS`.
        baselines: of `BASELINES`: the trunk as the run began it; the pixels, at most 32 x 32 of them.
        knn: how neighbours vote.
        linear: how linear classifiers are trained.
        svm: how SVMs are trained.
        resize: shorter side in pixels; by default 256/224 of the crop, or the crop itself below 64 pixels.
        crop: centre crop in pixels; by default the first of the run's crop sizes.
        limit: use only about so many images of each set.
        batch: images through the trunk at once.
        workers: processes of each rank that decode; by default one a core, 8 at most.
        features: folder, local or s3://, where features are kept as they come; empty: they are not.
        half: hold the training features in float16.
    """

    protocols: Sequence[str] = ("knn", "linear")
    baselines: Sequence[str] = ()
    knn: KnnSettings = field(default_factory=KnnSettings)
    linear: LinearSettings = field(default_factory=LinearSettings)
    svm: SvmSettings = field(default_factory=SvmSettings)
    resize: int | None = None
    crop: int | None = None
    limit: int | None = None
    batch: int = 256
    workers: int | None = None
    features: str = ""
    half: bool = False


def evaluate(
    checkpoint: str,
    train: Sequence[str],
    test: Sequence[str],
    wanted: Wanted | None = None,
    *,
    command: str = "evaluate",
    storage: StorageSection = _STORAGE,
    labels: LabelsSection = _LABELS,
    ranks: Ranks = _ALONE,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Results | None:
    """Measure a trunk and its baselines.

    Ranks share the images, and the search for neighbours; classifiers are then trained by rank 0.

    Args:
        checkpoint: whatever `load_trunk` reads.
        train: labelled shards that neighbours and classifiers come from.
        test: labelled shards that are classified.
        wanted: what is measured.
        command: that is named in the results.
        storage: fields that are set here override those of the run's configuration.
        labels: where labels come from.
        ranks: who measure, each on its device.
        reporter: is told how far it is.
        stop: whether to stop; asked every few seconds at most.

    Returns:
        What was found on rank 0, None on the others.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: settings that cannot work.
        DataError: the shards hold no labelled images.
        DrainedError: `stop` said so.
        StorageError: a location that cannot be read.
    """
    wanted = wanted or Wanted()
    if "svm" in wanted.protocols:
        check_svm()
    trunk, info = open_alike(checkpoint, partial(open_trunk, storage=storage), ranks)
    if reporter:
        reporter.event("weights", f"{info.url}: {info.report}", layout=info.layout)
    storage = info.config.storage.model_copy(update=storage.model_dump(exclude_unset=True))
    work = _Work(wanted, trunk, info, storage, ranks, reporter, stop)
    return work.run(train, test, labels, command)


@dataclass(frozen=True)
class _Work:
    """One evaluation on one rank."""

    wanted: Wanted
    trunk: Trunk
    info: TrunkInfo
    storage: StorageSection
    ranks: Ranks
    reporter: Reporter | None
    stop: Callable[[], bool]

    def run(
        self, train: Sequence[str], test: Sequence[str], labels: LabelsSection, command: str
    ) -> Results | None:
        wanted, store = self.wanted, Store(self.storage)
        preprocessing = choose_preprocessing(self.info.config.crops, resize=wanted.resize, crop=wanted.crop)
        columns = make_columns(self.trunk, self.info, wanted.baselines, crop=preprocessing.crop)
        if "knn" in wanted.protocols:
            self.ranks.lead(lambda: self._check_neighbours(train, store))
        sets = []
        for role, urls in (("train", train), ("test", test)):
            source = self.ranks.lead(lambda role=role: load_labels(labels, store, split=role))  # type: ignore[misc]
            sets.append(self._read(role, urls, source, SideBySide(columns.values()), preprocessing))
            if role == "train" and "knn" in wanted.protocols:
                self._fit_neighbours(sum(self.ranks.gather(len(sets[0].keys))))
        learnt, asked = sets
        widths = [each.feature_dim for each in columns.values()]
        data = {
            role: describe_set(found, urls, store, labels, self.ranks)
            for role, found, urls in (("train", learnt, train), ("test", asked, test))
        }
        values = self._measure(dict(zip(columns, widths, strict=True)), learnt, asked)
        if values is None:
            return None
        return Results(
            _describe(self.info, self.trunk.feature_dim),
            data,
            asdict(preprocessing),
            self._seeds(multi=learnt.labels.dim() == 2),
            values,
            command,
        )

    def _read(
        self,
        role: str,
        urls: Sequence[str],
        labels: Labels,
        module: SideBySide,
        preprocessing: Preprocessing,
    ) -> Features:
        wanted = self.wanted
        found = extract(
            module.eval(),
            urls,
            preprocessing=preprocessing,
            storage=self.storage,
            labels=labels,
            ranks=self.ranks,
            keep=join(wanted.features, role) if wanted.features else "",
            workers=default_workers() if wanted.workers is None else wanted.workers,
            batch=wanted.batch,
            device=self.ranks.device,
            limit=wanted.limit,
            dtype=torch.float16 if wanted.half and role == "train" else torch.float32,
            give_up=self.stop,
            on_images=_progress(self.reporter, role),
        )
        if wanted.half and not all(part.isfinite().all() for part in torch.split(found.features, _PART)):
            raise NonFiniteError("some features are too large for float16; leave --half out")
        return found

    def _measure(self, widths: dict[str, int], learnt: Features, asked: Features) -> list[Value] | None:
        """Let all ranks search for neighbours, then rank 0 train classifiers; return its values."""
        begins = [0, *accumulate(widths.values())]
        columns = {name: slice(*own) for name, own in zip(widths, pairwise(begins), strict=True)}
        found: dict[str, list[Value]] = {name: [] for name in columns}
        if "knn" in self.wanted.protocols:
            for name, own in columns.items():
                found[name] += self._neighbours(name, own, learnt, asked)
        classifiers = [each for each in self.wanted.protocols if each != "knn"]
        if classifiers:
            whole = [gather_features(each, self.ranks) for each in (learnt, asked)]
            together = Together(self.ranks, facts=lambda: None, on_facts=lambda _: None, give_up=self.stop)

            def train() -> None:
                sets = [each for each in whole if each is not None]
                for name, own in columns.items() if sets else ():
                    found[name] += self._classify(name, own, *sets, alive=together.look)

            together.run(train)
        return [value for values in found.values() for value in values] if self.ranks.leads else None

    def _neighbours(self, name: str, own: slice, learnt: Features, asked: Features) -> list[Value]:
        train, test, classes = number_classes(learnt.labels, asked.labels, self.ranks)
        found = measure_knn(
            learnt.features[:, own],
            train,
            asked.features[:, own],
            test,
            classes=classes,
            settings=self.wanted.knn,
            ranks=self.ranks,
            places=(flat_places(learnt.places), flat_places(asked.places)),
            alive=self._go_on,
        )
        return list(knn_values(name, found, self.wanted.knn, half=self.wanted.half))

    def _classify(
        self, name: str, own: slice, learnt: Features, asked: Features, *, alive: Callable[[], None]
    ) -> Iterator[Value]:
        train, test, classes = number_classes(learnt.labels, asked.labels, _ALONE)
        sets = (learnt.features[:, own], train, asked.features[:, own], test)
        wanted = self.wanted
        if "linear" in wanted.protocols:
            self._tell_training(
                name, f"linear, {wanted.linear.epochs} epochs, heads: {len(wanted.linear.heads)}"
            )
            device = self.ranks.device
            measured = measure_linear(
                *sets, classes=classes, settings=wanted.linear, device=device, alive=alive
            )
            yield from linear_values(name, measured, wanted.linear)
        if "svm" in wanted.protocols:
            self._tell_training(name, "linear SVMs")
            yield svm_value(
                name, measure_svm(*sets, classes=classes, settings=wanted.svm, alive=alive), wanted.svm
            )

    def _tell_training(self, name: str, what: str) -> None:
        if self.reporter:
            self.reporter.event("training", f"{name}: {what}", column=name)

    def _go_on(self) -> None:
        if self.stop():
            raise DrainedError("stopped by a signal before all was measured: the same command begins again")

    def _check_neighbours(self, urls: Sequence[str], store: Store) -> None:
        """Refuse a k that is larger than what the shards' producers counted, before any image is read."""
        counted, limit = list_manifest(urls, store).samples, self.wanted.limit
        if counted is not None:
            self.wanted.knn.fit(counted if limit is None else min(counted, limit))

    def _fit_neighbours(self, images: int) -> None:
        """Refuse, or tell of, each k that the images are too few for, before the test images are read."""
        used, left_out = self.wanted.knn.fit(images), self.wanted.knn.left_out(images)
        if left_out and self.reporter:
            out, used_text = (", ".join(map(str, group)) for group in (left_out, used))
            text = f"k = {out} is left out, k = {used_text} is used: there are only {images} training images"
            self.reporter.event("neighbours", text, images=images)

    def _seeds(self, *, multi: bool) -> dict[str, int]:
        wanted, seeds = self.wanted, {"untrained": self.info.config.stream.seed}
        if "linear" in wanted.protocols:
            seeds["linear"] = wanted.linear.seed
        if "svm" in wanted.protocols:
            seeds["svm"] = wanted.svm.seed
        if multi or "svm" in wanted.protocols:
            seeds["bootstrap"] = 0
        return seeds


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
        "layout": info.layout,
    }


def _progress(reporter: Reporter | None, what: str) -> Callable[[int], None]:
    """Speak up every few seconds only."""
    last = time.monotonic()

    def tell(images: int) -> None:
        nonlocal last
        if reporter and time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            reporter.event("features", f"{what}: {images:,} images", images=images)

    return tell
