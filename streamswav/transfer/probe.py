"""Probes: what the trunk is worth on labelled images beside the stream, while it is trained.

At every `evaluation.every` images the trunk as it is then gives the features of a labelled set; nearest
neighbours and a fresh linear classifier are measured on them. The classifier begins anew each time, from one
seed: so a probe has no state that a restart could lose, two probes can be compared, and no gradient of it
can reach the trunk, whose features are numbers by then. The run itself goes on as if nobody had looked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from streamswav.config import Config
from streamswav.defaults import known
from streamswav.errors import DataError, DrainedError, NonFiniteError, NotFoundError, StorageError
from streamswav.stream.labels import load_labels
from streamswav.stream.manifest import list_manifest
from streamswav.stream.store import Store, join
from streamswav.telemetry.progress import Reporter
from streamswav.training.distributed import Ranks
from streamswav.training.evaluating import as_saved
from streamswav.transfer.extraction.collected import Features
from streamswav.transfer.extraction.features import extract, gather_features
from streamswav.transfer.extraction.preprocessing import choose_preprocessing
from streamswav.transfer.measuring.knn import KnnSettings, measure_knn
from streamswav.transfer.measuring.labelled_sets import number_classes
from streamswav.transfer.measuring.linear import LinearSettings, measure_linear

PROBES_FILE = "probes.json"


class Probe:
    """Measures a run's trunk on the labelled sets of `evaluation`; every rank makes one.

    Args:
        config: of the run, complete.
        ranks: who share the labelled images; rank 0 measures.
        store: where the run lies.
        reporter: is told of a probe that failed.
        give_up: whether this rank was asked to stop: then a probe is left, so that the run is saved in time.

    Raises:
        ConfigError, ManifestError, StorageError: the labelled sets or their labels cannot be found.
    """

    def __init__(
        self, config: Config, ranks: Ranks, store: Store, reporter: Reporter, *, give_up: Callable[[], bool]
    ) -> None:
        self._config, self._ranks, self._store = config, ranks, store
        self._reporter, self._give_up = reporter, give_up
        self._place = join(config.run.directory, PROBES_FILE)
        self._labels = {
            "train": load_labels(config.labels, store, split="train"),
            "test": load_labels(config.labels, store, split="test"),
        }
        ranks.lead(self._find_sets)

    def due(self, images: int, batch: int) -> bool:
        """Tell whether the last `batch` of `images` passed a multiple of `evaluation.every`."""
        every = known(self._config.evaluation.every)
        return images // every > (images - batch) // every

    def measure(self, subject: nn.Module, *, step: int, images: int) -> Mapping[str, float]:
        """Measure a trunk, and add what came of it to `probes.json` in the run's folder.

        Where the sets cannot be read, or give features that are not finite, the run is worth more than a
        look at it: a warning is given. Only before the first step is it an error.

        Returns:
            Shares of the test images that are classified right, or with several labels an image the mean
            average precision, by the probe's name (`knn_20`, `linear`); nothing where it failed, or a stop
            was asked for.

        Raises:
            DataError, StorageError: before the first step: the sets hold nothing that can be used.
        """
        try:
            with as_saved(subject, self._ranks):
                train, test = (self._read(subject, role) for role in ("train", "test"))
                return self._ranks.lead(lambda: self._compare(train, test, step=step, images=images))
        except DrainedError:
            return {}
        except (StorageError, DataError, NonFiniteError) as error:
            if step == 0:
                raise
            self._reporter.event("warning", f"the probe at step {step} failed: {error}", step=step)
            return {}

    def _find_sets(self) -> None:
        for urls in (self._config.evaluation.train, self._config.evaluation.test):
            list_manifest(urls, self._store)

    def _read(self, trunk: nn.Module, role: str) -> Features | None:
        """Return the features of a set on rank 0, None on the others."""
        evaluation, ranks = self._config.evaluation, self._ranks
        found = extract(
            trunk,
            getattr(evaluation, role),
            preprocessing=choose_preprocessing(self._config.crops),
            storage=self._config.storage,
            labels=self._labels[role],
            ranks=ranks,
            workers=known(self._config.loader.workers),
            batch=self._batch,
            device=ranks.device,
            limit=evaluation.limit,
            give_up=self._give_up,
        )
        return gather_features(found, ranks)

    @property
    def _batch(self) -> int:
        """Images at once: what a step holds on this rank does without the backward pass as well."""
        return max(1, known(self._config.training.batch) // self._ranks.world_size)

    def _compare(
        self, train: Features | None, test: Features | None, *, step: int, images: int
    ) -> dict[str, float]:
        """Measure on rank 0, and write it down."""
        assert train is not None
        assert test is not None
        evaluation, device = self._config.evaluation, self._ranks.device
        learnt, asked, classes = number_classes(train.labels, test.labels, Ranks())
        sets = (train.features, learnt, test.features, asked)
        settings = KnnSettings((min(evaluation.neighbours, len(learnt)),))
        nearest = measure_knn(*sets, classes=classes, settings=settings, device=device)
        scores = {f"knn_{vote.k}": _first(found.scores) for vote, found in nearest.items()}
        if evaluation.linear_epochs:
            linear = LinearSettings(epochs=evaluation.linear_epochs, standardise=True)
            measured = measure_linear(*sets, classes=classes, settings=linear, device=device)
            scores["linear"] = _first(measured.heads[measured.best].scores)
        self._note({"step": step, "images": images, **scores})
        return scores

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Add to the list of probes; those of steps that a crash took back are dropped."""
        before: list[dict[str, Any]] = []
        try:
            before = json.loads(self._store.read(self._place))
        except NotFoundError:
            pass
        except ValueError:
            self._reporter.event("warning", f"{self._place} is damaged and begun anew")
        kept = [each for each in before if each["step"] < entry["step"]]
        lines = ",\n".join(map(json.dumps, [*kept, dict(entry)]))
        self._store.write(self._place, f"[\n{lines}\n]\n".encode())


def _first(scores: Mapping[str, float]) -> float:
    """Return the score that a protocol is known by: top-1, or mean average precision."""
    return next(iter(scores.values()))
