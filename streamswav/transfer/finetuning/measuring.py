"""What a finetuned network gets right on the test set: between passes, and at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from pydantic import TypeAdapter
from torch import nn

from streamswav.config import Config, FinetuneSection
from streamswav.errors import ConfigError, DrainedError, NotFoundError
from streamswav.stream.store import Store, join, redact
from streamswav.training.distributed import Ranks
from streamswav.training.evaluating import as_saved
from streamswav.transfer.extraction.collected import Features
from streamswav.transfer.extraction.features import extract, gather_features
from streamswav.transfer.extraction.preprocessing import Preprocessing, choose_preprocessing
from streamswav.transfer.extraction.reading import default_workers
from streamswav.transfer.finetuning.finetune import LabelledData
from streamswav.transfer.finetuning.network import FinetuneNetwork, ScoreRows, head_settings
from streamswav.transfer.measuring.intervals import Interval
from streamswav.transfer.measuring.labelled_sets import describe_set
from streamswav.transfer.measuring.precision import measure_precision
from streamswav.transfer.measuring.results import DataUsed, Results, Value, measure_accuracy
from streamswav.transfer.measuring.results_file import read_results

RESULTS_FILE = "results.json"
EVALUATIONS = "evaluations"

_LOOKED_AT = 8
_LAST = "checkpoint"
_BEST = "best epoch, chosen on these test images"


@dataclass(frozen=True)
class Scored:
    """Shares from 0 to 1 by metric, and their intervals."""

    scores: Mapping[str, float]
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Measured:
    """What the network of one step got right, each of its heads.

    Attributes:
        step: optimizer steps done.
        images: trained until then.
        heads: what each of them got right.
    """

    step: int
    images: int
    heads: Sequence[Scored]


_SHAPE = TypeAdapter(Measured)


class Measuring:
    """Measures on the test set, keeps what was measured beside the run, and writes its results.

    Args:
        config: complete.
        data: the test set and its labels.
        trained: what was trained on.
        ranks: all call `measure` and `finish` after the same step.
        store: of the run.
        drain: whether to stop; then nothing is measured, and it is done when the run goes on.
    """

    def __init__(
        self,
        config: Config,
        data: LabelledData,
        trained: DataUsed,
        *,
        ranks: Ranks,
        store: Store,
        drain: Callable[[], bool],
    ) -> None:
        every, samples = config.finetune.evaluate_every, config.stream.samples
        if every and not samples:
            reason = "the shards do not say how many samples a pass has; give stream.samples"
            raise ConfigError("finetune.evaluate_every", reason, value=every)
        self._every = every * samples if every and samples else None
        self._config, self._data, self._trained = config, data, trained
        self._ranks, self._store, self._drain = ranks, store, drain
        self._folder = join(config.run.directory, EVALUATIONS)
        self._last: tuple[Measured, DataUsed] | None = None

    def due(self, images: int, batch: int) -> bool:
        """Tell whether so many passes have ended with the last step."""
        return self._every is not None and images // self._every > (images - batch) // self._every

    def measure(self, subject: nn.Module, *, step: int, images: int) -> Mapping[str, float]:
        """Measure the network, and keep what it came to; at the start there is nothing to measure."""
        if not step:
            return {}
        try:
            measured, _ = self._measure_once(subject, step=step, images=images)
        except DrainedError:
            return {}
        return {f"test_{metric}": share for metric, share in measured.heads[0].scores.items()}

    def finish(self, subject: nn.Module, *, step: int, images: int) -> Results:
        """Return the results of a run that is done, measured if they are not known, and written.

        Raises:
            DrainedError: a drain was asked for meanwhile.
        """
        place = join(self._config.run.directory, RESULTS_FILE)
        known = self._ranks.lead(lambda: self._read(place, step))
        if known is not None:
            return known
        measured, tested = self._measure_once(subject, step=step, images=images)
        results = self._results(measured, tested)
        self._ranks.lead(lambda: self._store.write(place, results.to_json().encode()))
        return results

    def _measure_once(self, subject: nn.Module, *, step: int, images: int) -> tuple[Measured, DataUsed]:
        if self._last is None or self._last[0].step != step:
            self._last = self._measure(subject, step, images)
        return self._last

    def _measure(self, subject: nn.Module, step: int, images: int) -> tuple[Measured, DataUsed]:
        network, ranks = cast("FinetuneNetwork", subject), self._ranks
        with as_saved(network, ranks):
            own = extract(
                ScoreRows(network),
                self._data.test_urls,
                preprocessing=self._preprocessing,
                storage=self._config.storage,
                labels=self._data.test,
                ranks=ranks,
                workers=default_workers(),
                device=ranks.device,
                give_up=self._drain,
            )
        used = describe_set(own, self._data.test_urls, self._store, self._config.labels, ranks)
        features = gather_features(own, ranks)
        heads = ranks.lead(lambda: self._score(features))
        measured = Measured(step, images, heads)
        if self._every:
            ranks.lead(lambda: self._keep(measured))
        return measured, used

    def _score(self, features: Features | None) -> list[Scored]:
        """Return what every head got right; on rank 0, which has all scores."""
        assert features is not None
        rows = features.features.view(len(features.keys), len(head_settings(self._config)), -1)
        measure = measure_precision if self._data.test.multi else measure_accuracy
        heads = [measure(scores, features.labels) for scores in rows.unbind(1)]
        return [Scored(each.scores, each.intervals) for each in heads]

    @property
    def _preprocessing(self) -> Preprocessing:
        section = self._config.finetune
        return choose_preprocessing(self._config.crops, resize=section.resize, crop=section.crop)

    def _keep(self, measured: Measured) -> None:
        """Write what was measured; what lies there of later steps is of a training that was lost."""
        for url, kept in self._kept():
            if kept.step > measured.step:
                self._store.delete(url)
        place = join(self._folder, f"step-{measured.step:09d}.json")
        self._store.write(place, _SHAPE.dump_json(measured))

    def _kept(self) -> list[tuple[str, Measured]]:
        """Read what was measured so far, in order."""
        try:
            urls = sorted(info.url for info in self._store.list(self._folder))
        except NotFoundError:
            return []
        return [(url, _SHAPE.validate_json(self._store.read(url))) for url in urls]

    def _read(self, place: str, step: int) -> Results | None:
        if not self._store.exists(place):
            return None
        known = read_results(place, self._store)
        return known if known.model.get("step") == step else None

    def _results(self, measured: Measured, tested: DataUsed) -> Results:
        config = self._config
        values = [self._value(measured, head, _LAST) for head in range(len(measured.heads))]
        if self._every:
            kept = [each for _, each in self._ranks.lead(self._kept)]
            for head in range(len(measured.heads)):
                best = max(kept, key=lambda each: next(iter(each.heads[head].scores.values())))
                values.append(self._value(best, head, _BEST))
        return Results(
            _describe(config, measured),
            {"train": self._trained, "test": tested},
            asdict(self._preprocessing),
            {"training": config.stream.seed, "subset": config.finetune.subset_seed},
            values,
            command="finetune",
        )

    def _value(self, measured: Measured, head: int, column: str) -> Value:
        """Return what one head got right, with all that one needs to read it."""
        config, settings = self._config, head_settings(self._config)
        section, optimizer = config.finetune, config.optimizer
        protocol = "finetuned" if config.model.init else "from scratch"
        if section.mode == "frozen":
            protocol = "linear, augmented crops"
        if len(settings) > 1:
            protocol += f", rate {settings[head].rate:g}, weight decay {settings[head].weight_decay:g}"
        about = {
            "mode": section.mode,
            "passes": config.stream.turns,
            "batch": config.training.batch,
            "optimizer": optimizer.name,
            "schedule": optimizer.schedule,
            "rate": optimizer.rate,
            "head_rate": settings[head].rate,
            "weight_decay": optimizer.weight_decay,
            "head_weight_decay": settings[head].weight_decay,
            "step": measured.step,
            "reported": "last epoch" if column == _LAST else column,
        }
        changed = ("layer_decay", "label_smoothing", "mixup", "cutmix", "rand_augment", "per_class")
        plain = FinetuneSection()
        about |= {
            name: getattr(section, name) for name in changed if getattr(section, name) != getattr(plain, name)
        }
        found = measured.heads[head]
        return Value(protocol, about, column, found.scores, found.intervals)


def refuse_unlabelled(data: LabelledData, ranks: Ranks) -> None:
    """Refuse a test set whose first images have no labels, before anything is trained.

    Raises:
        DataError: not one of them can be used.
        ManifestError, StorageError: there is no such set.
    """
    config = data.config
    section = config.finetune
    wanted = choose_preprocessing(config.crops, resize=section.resize, crop=section.crop)

    def look() -> None:
        extract(
            nn.Flatten(),
            data.test_urls,
            preprocessing=wanted,
            storage=config.storage,
            labels=data.test,
            limit=_LOOKED_AT,
        )

    ranks.lead(look)


def _describe(config: Config, measured: Measured) -> dict[str, object]:
    model = config.model
    return {
        "trunk": model.trunk,
        "width": model.width,
        "stem": model.stem,
        "init": redact(model.init) or "scratch",
        "checkpoint": redact(config.run.directory),
        "step": measured.step,
        "images": measured.images,
        "classes": config.labels.classes,
    }
