"""Several results side by side: what changed, how surely, and whether they can be compared at all."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamswav.transfer.measuring.intervals import CONFIDENCE, difference
from streamswav.transfer.measuring.results import DataUsed, Results, Value, name_row

FORMAT_VERSION = 1

_OWN_COLUMN = "checkpoint"
_FOOT = (
    "Differences are to the first file. Brackets: 95% intervals; those of differences are of two independent "
    "samples, so where the test images are the same they are rather too wide."
)


@dataclass(frozen=True)
class Row:
    """One metric of one protocol in every file; None where a file lacks it.

    Attributes:
        values: the measurements it is of.
    """

    protocol: str
    metric: str
    column: str
    values: tuple[Value | None, ...]

    @property
    def name(self) -> str:
        """What people read."""
        where = "" if self.column == _OWN_COLUMN else f" [{self.column}]"
        return name_row(self.protocol, self.metric) + where

    def score(self, number: int) -> float | None:
        """The share that a file has."""
        value = self.values[number]
        return None if value is None else value.scores.get(self.metric)

    def interval(self, number: int) -> tuple[float, float] | None:
        """The interval of that share."""
        value = self.values[number]
        found = None if value is None else value.intervals.get(self.metric)
        return None if found is None else (found.low, found.high)

    def change(self, number: int) -> float | None:
        """How much more a file has than the first."""
        first, own = self.score(0), self.score(number)
        return None if first is None or own is None else own - first

    def change_interval(self, number: int) -> tuple[float, float] | None:
        """The interval of that difference."""
        first, own = self.values[0], self.values[number]
        if first is None or own is None or self.change(number) is None:
            return None
        one, other = (each.intervals.get(self.metric) for each in (first, own))
        return difference(first.scores[self.metric], one, own.scores[self.metric], other)


class Comparison:
    """Results of several files.

    Args:
        files: names of the files.
        results: what each holds; the first is what others are compared with.

    Attributes:
        rows: every metric of every protocol and column, in the order of the files.
        notes: what makes figures less comparable than they look.
    """

    def __init__(self, files: Sequence[str], results: Sequence[Results]) -> None:
        self.files, self.results = files, results
        self.names = _short_names(files)
        self.rows = list(_rows(results))
        self.notes = [
            f"{self.names[number]}: {note}"
            for number in range(1, len(results))
            for note in _differences(results[0], results[number], self.rows, number)
        ]
        if not any(all(each.score(number) is not None for number in range(len(files))) for each in self.rows):
            self.notes.insert(0, "no measurement is in all files")

    def to_table(self) -> str:
        """Return lines for people."""
        head = [f"{name}: {_describe(each)}" for name, each in zip(self.names, self.results, strict=True)]
        cells = self._cells()
        widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip()
            for row in cells
        ]
        return "\n".join([*head, *self._shown_notes(), "", *lines, "", _FOOT])

    def to_markdown(self) -> str:
        """Return a table for a document."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        rule = ["---"] + ["---:"] * (len(cells[0]) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._shown_notes()), f"- {_FOOT}"])

    def to_data(self) -> dict[str, Any]:
        """Return plain data: files, notes, and the rows with values and differences in the files' order."""
        numbers = range(len(self.files))
        return {
            "format_version": FORMAT_VERSION,
            "confidence": CONFIDENCE,
            "files": [
                {"file": file, "command": each.command, "model": dict(each.model)}
                for file, each in zip(self.files, self.results, strict=True)
            ],
            "notes": self.notes,
            "rows": [
                {
                    "protocol": row.protocol,
                    "metric": row.metric,
                    "column": row.column,
                    "values": [_pack("score", row.score(each), row.interval(each)) for each in numbers],
                    "differences": [
                        _pack("change", row.change(each), row.change_interval(each)) for each in numbers[1:]
                    ],
                }
                for row in self.rows
            ],
        }

    def _shown_notes(self) -> list[str]:
        return [f"NOT THE SAME: {note}" for note in self.notes]

    def _cells(self) -> list[list[str]]:
        """Return rows of texts, the first of them with the columns' names."""
        others = range(1, len(self.files))
        rows = [["per cent", *self.names, *(f"{self.names[each]} - {self.names[0]}" for each in others)]]
        for row in self.rows:
            scores = [_show(row.score(each), row.interval(each)) for each in range(len(self.files))]
            changes = [_show(row.change(each), row.change_interval(each), sign="+") for each in others]
            rows.append([row.name, *scores, *changes])
        return rows


def _rows(results: Sequence[Results]) -> Iterator[Row]:
    found = [{(value.protocol, value.column): value for value in each.values} for each in results]
    for place in dict.fromkeys(key for each in found for key in each):
        values = tuple(each.get(place) for each in found)
        for metric in dict.fromkeys(name for value in values if value for name in value.scores):
            yield Row(place[0], metric, place[1], values)


def _differences(first: Results, other: Results, rows: Sequence[Row], number: int) -> Iterator[str]:
    for role in dict.fromkeys([*first.data, *other.data]):
        if role not in first.data or role not in other.data:
            yield f"{role} data is named in one file only"
        elif reason := _other_data(first.data[role], other.data[role]):
            yield f"{role} data: {reason}"
    if shown := _other_settings(first.preprocessing, other.preprocessing):
        yield f"preprocessing: {shown}"
    for protocol in dict.fromkeys(row.protocol for row in rows):
        pairs = [row.values for row in rows if row.protocol == protocol]
        for one, own in ((values[0], values[number]) for values in pairs):
            if one and own and (shown := _other_settings(one.settings, own.settings)):
                yield f"settings of {protocol}: {shown}"
                break


def _other_data(first: DataUsed, other: DataUsed) -> str:
    """Say how the images differ; nothing where they are the same as far as the files tell."""
    if first.digest and other.digest:
        if first.digest == other.digest:
            return ""
        if (first.images, first.classes) == (other.images, other.classes):
            return f"other images or labels, {first.images:,} each"
    elif (first.images, first.classes) == (other.images, other.classes):
        same = list(first.urls) == list(other.urls)
        return (
            ""
            if same
            else f"{' '.join(first.urls)} against {' '.join(other.urls)}, as many images and classes"
        )
    return (
        f"{first.images:,} images of {first.classes:,} classes against "
        f"{other.images:,} images of {other.classes:,} classes"
    )


def _other_settings(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """List what both files name with different values."""
    both = [name for name in first if name in other and _plain(first[name]) != _plain(other[name])]
    return ", ".join(f"{name} {_text(first[name])} against {_text(other[name])}" for name in both)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _short_names(files: Sequence[str]) -> list[str]:
    """Name files by as much of the end of their paths as tells them apart."""
    paths = [posixpath.splitext(file)[0].split("/") for file in files]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(files, 1)]


def _describe(results: Results) -> str:
    model = results.model
    known = (
        f"{name} {model[name]}" for name in ("checkpoint", "step", "images") if model.get(name) is not None
    )
    return ", ".join([results.command or "results", *known])


def _show(share: float | None, interval: tuple[float, float] | None, sign: str = "") -> str:
    if share is None:
        return "-"
    ends = "" if interval is None else " (" + " to ".join(f"{100 * end:{sign}.2f}" for end in interval) + ")"
    return f"{100 * share:{sign}.2f}{ends}"


def _pack(name: str, share: float | None, interval: tuple[float, float] | None) -> dict[str, float] | None:
    if share is None:
        return None
    return {name: share, **dict(zip(("low", "high"), interval or (), strict=False))}
