"""What an evaluation found, with all that is needed to read the numbers: one schema for every protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, 0 to 1, whose class is the best guess, and among the best five."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Value:
    """One number that was measured, or a few of one measurement.

    Attributes:
        protocol: how, in words for people (`kNN, k = 20`).
        settings: how, for machines.
        column: what was measured: `checkpoint`, or a baseline.
        scores: by metric (`top1`), shares from 0 to 1.
    """

    protocol: str
    settings: Mapping[str, Any]
    column: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class DataUsed:
    """One labelled set as it was read.

    Attributes:
        urls: of its shards.
        images: that were used.
        classes: distinct labels.
        skipped: samples and stretches that were not used, by reason.
    """

    urls: Sequence[str]
    images: int
    classes: int
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Everything one evaluation says.

    Attributes:
        model: trunk, checkpoint, its step and images.
        data: the sets by role (`train`, `test`).
        preprocessing: of the images.
        seeds: by what they seed.
        values: the measurements.
    """

    model: Mapping[str, Any]
    data: Mapping[str, DataUsed]
    preprocessing: Mapping[str, Any]
    seeds: Mapping[str, int]
    values: Sequence[Value]

    def to_json(self) -> str:
        """Return the schema's JSON, indented, with `format_version`."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)

    def to_table(self) -> str:
        """Return lines for people: what was given, then a row a measurement and a column a subject."""
        settings = {each.protocol: each.settings for each in self.values}
        head = {role: _describe(used) for role, used in self.data.items()}
        head |= {"model": _list(self.model), "images": _list(self.preprocessing)}
        head |= {protocol: _list(values) for protocol, values in settings.items()}
        wide = max(map(len, head))
        return "\n".join([*(f"{name:<{wide}}  {text}" for name, text in head.items()), "", *self._rows()])

    def value(self, protocol: str, column: str = "checkpoint") -> Value:
        """Return the one measurement of a protocol and column; KeyError where there is none."""
        return {(each.protocol, each.column): each for each in self.values}[protocol, column]

    def _rows(self) -> list[str]:
        columns = list(dict.fromkeys(each.column for each in self.values))
        cells: dict[str, dict[str, str]] = {}
        for each in self.values:
            for metric, share in each.scores.items():
                row = cells.setdefault(f"{each.protocol}, {_METRICS.get(metric, metric)}", {})
                row[each.column] = f"{100 * share:.2f}"
        wide = max(len(name) for name in [*cells, "per cent"])
        rows = [("per cent", {column: column for column in columns}), *cells.items()]
        return [
            f"{name:<{wide}}" + "".join(f"{row.get(column, '-'):>12}" for column in columns)
            for name, row in rows
        ]


_METRICS = {"top1": "top-1", "top5": "top-5"}


def measure_accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Compare scores [N, C] with labels [N]; a class scored -inf is never a guess.

    With fewer than five classes, all of them are among the best five.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & best.values.isfinite()
    return Accuracy(hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item())


def _describe(used: DataUsed) -> str:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in used.skipped.items())
    passed = f"; not used: {skipped}" if skipped else ""
    return f"{used.images:,} images, {used.classes:,} classes, {' '.join(used.urls)}{passed}"


def _list(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_show(value)}" for name, value in values.items())


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
