"""What a measurement found, with all that is needed to read the numbers: one schema for every protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Protocol

import torch
from torch import Tensor

from streamswav import __version__
from streamswav.transfer.measuring.intervals import CONFIDENCE, Interval, over_seeds, wilson

FORMAT_VERSION = 2


class Measured(Protocol):
    """Figures of one measurement."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Shares by metric."""

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """Their intervals of 95% by metric."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, 0 to 1, whose class is the best guess, and among the best five.

    Attributes:
        images: of how many.
    """

    top1: float
    top5: float
    images: int = 0

    @property
    def scores(self) -> dict[str, float]:
        """The shares by metric."""
        return {"top1": self.top1, "top5": self.top5}

    @property
    def intervals(self) -> dict[str, Interval]:
        """Wilson's intervals by metric."""
        return {metric: wilson(share, self.images) for metric, share in self.scores.items()}


@dataclass(frozen=True)
class Hits:
    """Numbers of images whose class is the best guess, and among the best five, of so many images."""

    top1: int = 0
    top5: int = 0
    images: int = 0

    def __add__(self, other: Hits) -> Hits:
        return Hits(self.top1 + other.top1, self.top5 + other.top5, self.images + other.images)

    @property
    def accuracy(self) -> Accuracy:
        """Shares of the images."""
        images = max(1, self.images)
        return Accuracy(self.top1 / images, self.top5 / images, self.images)


@dataclass(frozen=True)
class Value:
    """One number that was measured, or a few of one measurement.

    Attributes:
        protocol: how, in words for people (`kNN, k = 20`); with the column it is unique in a `Results`.
        settings: how, for machines.
        column: what was measured: `checkpoint`, or a baseline.
        scores: by metric (`top1`, `top5`, `mAP`, `mAP_11`), shares from 0 to 1; with several seeds the mean.
        intervals: of 95%, by metric, where there is one.
        by_seed: with several seeds: by metric, then by seed, what each gave.
        spread: with several seeds: by metric, the standard deviation over them (n - 1).
    """

    protocol: str
    settings: Mapping[str, Any]
    column: str
    scores: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    by_seed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataUsed:
    """One labelled set as it was read.

    Attributes:
        urls: of its shards.
        images: that were used.
        classes: distinct labels.
        skipped: samples and stretches that were not used, by reason.
        digest: over keys and labels of the images that were used, in whatever shards they lie.
        shards: digest of the manifest: names and sizes of the shards.
        labels: where labels came from: a table, or a member of the samples.
    """

    urls: Sequence[str]
    images: int
    classes: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    digest: str = ""
    shards: str = ""
    labels: str = ""


@dataclass(frozen=True)
class Results:
    """Everything one measurement says.

    Attributes:
        model: trunk, checkpoint, its step and images.
        data: the sets by role (`train`, `test`).
        preprocessing: of the images.
        seeds: by what they seed.
        values: the measurements.
        command: that measured.
        program: that wrote this, with its version.
    """

    model: Mapping[str, Any]
    data: Mapping[str, DataUsed]
    preprocessing: Mapping[str, Any]
    seeds: Mapping[str, int]
    values: Sequence[Value]
    command: str = ""
    program: str = f"streamswav {__version__}"

    def to_json(self) -> str:
        """Return the schema's JSON, indented, with `format_version` and the intervals' `confidence`."""
        head = {"format_version": FORMAT_VERSION, "confidence": CONFIDENCE}
        return json.dumps({**head, **asdict(self)}, indent=2, allow_nan=False)

    def to_table(self) -> str:
        """Return lines for people: what was given, then a row a measurement and a column a subject."""
        head = {role: _describe(used) for role, used in self.data.items()}
        head |= {"model": _list(self.model), "images": _list(self.preprocessing)}
        head |= self._settings()
        wide = max(map(len, head))
        return "\n".join([*(f"{name:<{wide}}  {text}" for name, text in head.items()), "", *self._rows()])

    def value(self, protocol: str, column: str = "checkpoint") -> Value:
        """Return the one measurement of a protocol and column; KeyError where there is none."""
        return {(each.protocol, each.column): each for each in self.values}[protocol, column]

    def _settings(self) -> dict[str, str]:
        """Describe every protocol; of one with a comma in its name (`kNN, k = 200`) what the first lacks."""
        first: dict[str, Mapping[str, Any]] = {}
        told: dict[str, str] = {}
        for each in self.values:
            of_kind = first.setdefault(each.protocol.partition(",")[0], each.settings)
            own = {name: value for name, value in each.settings.items() if of_kind.get(name) != value}
            told.setdefault(each.protocol, _list(each.settings if of_kind is each.settings else own))
        return {protocol: text for protocol, text in told.items() if text}

    def _rows(self) -> list[str]:
        columns = list(dict.fromkeys(each.column for each in self.values))
        cells: dict[str, dict[str, str]] = {}
        for each in self.values:
            for metric, share in each.scores.items():
                row = cells.setdefault(name_row(each.protocol, metric), {})
                row[each.column] = _show_share(share, each.intervals.get(metric))
        wide = max(len(name) for name in [*cells, "per cent"])
        broad = 2 + max(len(text) for row in cells.values() for text in [*row.values(), *columns])
        rows = [("per cent", {column: column for column in columns}), *cells.items()]
        return [
            f"{name:<{wide}}" + "".join(f"{row.get(column, '-'):>{broad}}" for column in columns)
            for name, row in rows
        ]


_METRICS = {"top1": "top-1", "top5": "top-5", "mAP_11": "mAP of 11 points"}


def name_row(protocol: str, metric: str) -> str:
    """Return the name that people read."""
    return f"{protocol}, {_METRICS.get(metric, metric)}"


def to_value(protocol: str, settings: Mapping[str, Any], column: str, measured: Measured) -> Value:
    """Return what was measured, with its intervals."""
    return Value(protocol, settings, column, measured.scores, measured.intervals)


def over_runs(
    protocol: str, settings: Mapping[str, Any], column: str, runs: Mapping[int, Mapping[str, float]]
) -> Value:
    """Return the mean over seeds with its t interval and the spread.

    Args:
        protocol: for people.
        settings: for machines.
        column: what was measured.
        runs: shares by metric, by seed.
    """
    metrics = list(next(iter(runs.values())))
    by_metric = {metric: {str(seed): run[metric] for seed, run in runs.items()} for metric in metrics}
    shares = {metric: list(found.values()) for metric, found in by_metric.items()}
    intervals = {metric: interval for metric in metrics if (interval := over_seeds(shares[metric]))}
    return Value(
        protocol,
        settings,
        column,
        {metric: fmean(shares[metric]) for metric in metrics},
        intervals,
        by_metric,
        {metric: stdev(shares[metric]) for metric in intervals},
    )


def count_hits(scores: Tensor, labels: Tensor) -> Hits:
    """Compare scores [N, C] with labels [N]; a class scored -inf is never a guess.

    With fewer than five classes, all of them are among the best five.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & best.values.isfinite()
    counts = torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()]).tolist()
    return Hits(int(counts[0]), int(counts[1]), len(labels))


def measure_accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Return the shares of `count_hits`."""
    return count_hits(scores, labels).accuracy


def _show_share(share: float, interval: Interval | None) -> str:
    if interval is None:
        return f"{100 * share:.2f}"
    return f"{100 * share:.2f} ({100 * interval.low:.2f}-{100 * interval.high:.2f})"


def _describe(used: DataUsed) -> str:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in used.skipped.items())
    passed = f"; not used: {skipped}" if skipped else ""
    return f"{used.images:,} images, {used.classes:,} classes, {' '.join(used.urls)}{passed}"


def _list(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_show(value)}" for name, value in values.items())


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "unknown"
    if isinstance(value, list | tuple):
        return " ".join(map(_show, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
