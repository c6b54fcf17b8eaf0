"""What a finetuned network gets right on the test set: between passes, and at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from torch import nn

from streamswav.config import Config, FinetuneSection
from streamswav.errors import ConfigError, NotFoundError
from streamswav.stream.store import Store, join, redact
from streamswav.training.distributed import Ranks
from streamswav.training.evaluating import as_saved
from streamswav.transfer.evaluation import choose_preprocessing
from streamswav.transfer.features import Features, Preprocessing, extract
from streamswav.transfer.finetune import LabelledData
from streamswav.transfer.finetune_network import FinetuneNetwork, ScoreRows, head_settings
from streamswav.transfer.intervals import wilson
from streamswav.transfer.results import DataUsed, Results, Value, measure_accuracy
from streamswav.transfer.results_file import read_results

RESULTS_FILE = "results.json"
EVALUATIONS = "evaluations"

_LOOKED_AT = 8
_MOST_WORKERS = 8
_LAST = "checkpoint"
_BEST = "best epoch, chosen on these test images"


@dataclass(frozen=True)
class Measured:
    """What the network of one step got right, each of its heads.

    Attributes:
        step: optimizer steps done.
        images: trained until then.
        heads: shares by metric, a head each.
        tested: images that were measured on.
    """

    step: int
    images: int
    heads: Sequence[Mapping[str, float]]
    tested: int


class Measuring:
    """Measures on the test set, keeps what was measured beside the run, and writes its results.

    Args:
        config: complete.
        data: the test set and its labels.
        trained: what was trained on.
        ranks: all call `measure` and `finish` after the same step.
        store: of the run.
    """

    def __init__(
        self, config: Config, data: LabelledData, trained: DataUsed, ranks: Ranks, store: Store
    ) -> None:
        every, samples = config.finetune.evaluate_every, config.stream.samples
        if every and not samples:
            reason = "the shards do not say how many samples a pass has; give stream.samples"
            raise ConfigError("finetune.evaluate_every", reason, value=every)
        self._every = every * samples if every and samples else None
        self._config, self._data, self._trained = config, data, trained
        self._ranks, self._store = ranks, store
        self._folder = join(config.run.directory, EVALUATIONS)
        self._last: tuple[Measured, DataUsed] | None = None

    def due(self, images: int, batch: int) -> bool:
        """Tell whether so many passes have ended with the last step."""
        return self._every is not None and images // self._every > (images - batch) // self._every

    def measure(self, subject: nn.Module, *, step: int, images: int) -> Mapping[str, float]:
        """Measure the network, and keep what it came to; at the start there is nothing to measure."""
        if not step:
            return {}
        if self._last is None or self._last[0].step != step:
            self._last = self._measure(subject, step, images)
        return {f"test_{metric}": share for metric, share in self._last[0].heads[0].items()}

    def finish(self, subject: nn.Module, *, step: int, images: int) -> Results:
        """Return the results of a run that is done, measured if they are not known, and written."""
        place = join(self._config.run.directory, RESULTS_FILE)
        known = self._ranks.lead(lambda: self._read(place, step))
        if known is not None:
            return known
        self.measure(subject, step=step, images=images)
        assert self._last is not None
        measured, tested = self._last
        results = self._results(measured, tested)
        self._ranks.lead(lambda: self._store.write(place, results.to_json().encode()))
        return results

    def _measure(self, subject: nn.Module, step: int, images: int) -> tuple[Measured, DataUsed]:
        network = cast("FinetuneNetwork", subject)
        with as_saved(network, self._ranks):
            heads, used = self._ranks.lead(lambda: self._score(network))
        measured = Measured(step, images, heads, used.images)
        if self._every:
            self._ranks.lead(lambda: self._keep(measured))
        return measured, used

    def _score(self, network: FinetuneNetwork) -> tuple[list[Mapping[str, float]], DataUsed]:
        """Return the shares of every head."""
        features = extract(
            ScoreRows(network),
            self._data.test_urls,
            preprocessing=self._preprocessing,
            storage=self._config.storage,
            workers=min(len(os.sched_getaffinity(0)), _MOST_WORKERS),
            device=self._ranks.device,
        )
        rows = features.features.view(len(features.labels), len(head_settings(self._config)), -1)
        shares = [measure_accuracy(scores, features.labels).scores for scores in rows.unbind(1)]
        return list(shares), _used(features, self._data.test_urls)

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
        self._store.write(place, json.dumps(asdict(measured)).encode())

    def _kept(self) -> list[tuple[str, Measured]]:
        """Read what was measured so far, in order."""
        try:
            urls = sorted(info.url for info in self._store.list(self._folder))
        except NotFoundError:
            return []
        return [(url, Measured(**json.loads(self._store.read(url)))) for url in urls]

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
                best = max(kept, key=lambda each: next(iter(each.heads[head].values())))
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
        shares = measured.heads[head]
        intervals = {metric: wilson(share, measured.tested) for metric, share in shares.items()}
        return Value(protocol, about, column, shares, intervals)


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
        extract(nn.Flatten(), data.test_urls, preprocessing=wanted, storage=config.storage, limit=_LOOKED_AT)

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


def _used(features: Features, urls: Sequence[str]) -> DataUsed:
    shown = [redact(url) for url in urls]
    return DataUsed(shown, len(features.labels), len(set(features.labels.tolist())), features.skipped)
