"""Tables of labels by key: CSV, TSV and parquet files, read into two sorted arrays of numbers.

A whole number in a column of labels is a class number; in a column without any, all texts are class names.
An empty cell is no label. Several columns of labels are a class each: 1 stands for present, 0, -1 and an
empty cell for not present, except for the one that `labels.unknown` names: there nobody knows. A class of
which nobody knows is held as the complement of its number, ~number.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from streamswav.config import LabelsSection
from streamswav.errors import ConfigError
from streamswav.stream.key_table import find_key, hash_key, normalise_key
from streamswav.stream.store import Store, redact

NO_LABEL = -1
OTHER_SPLIT = -2
MOST_CLASSES = 1 << 24

_FILE = "labels.file"
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_DELIMITERS = ",\t;|"
_SHOWN = 8
_PRESENT = frozenset({"1", "1.0", "true", "True", "TRUE"})
_ABSENT = frozenset({"", "0", "-1", "0.0", "-1.0", "false", "False", "FALSE", "nan"})


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Labels by the hash of the key.

    Attributes:
        keys: uint64 [N], growing.
        codes: int32 [N]: a class number, with `multi` the number of a set of classes; else `NO_LABEL` or
            `OTHER_SPLIT`.
        starts: int64 [M + 1], where the sets begin in `members`.
        members: int32, growing class numbers of one set after the other.
        multi: whether labels are sets.
        example: the first key of the table.
    """

    keys: NDArray[np.uint64]
    codes: NDArray[np.int32]
    starts: NDArray[np.int64]
    members: NDArray[np.int32]
    multi: bool
    example: str

    def find(self, key: str) -> int:
        """Return the code of a sample's key; `NO_LABEL` where it is not there."""
        place = find_key(self.keys, key)
        return int(self.codes[place]) if place >= 0 else NO_LABEL

    def classes_of(self, code: int) -> tuple[int, ...]:
        """Return the classes of a set."""
        return tuple(self.members[self.starts[code] : self.starts[code + 1]].tolist())


def as_number(value: object) -> int | None:
    """Return a whole number, also where it is written as text or with a decimal point; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        number = (
            float(cast("Any", value)) if isinstance(value, float) or "." in str(value) else int(str(value))
        )
    except ValueError:
        return None
    return int(number) if abs(number) < MOST_CLASSES and number == int(number) else None  # not so for NaN


def split_cell(value: object, separator: str) -> list[Any]:
    """Return the single labels of a cell or member: the entries of a list, or what a separator parts."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and separator:
        return [part for each in value.split(separator) if (part := each.strip())]
    return [value]


def read_table(
    section: LabelsSection, store: Store, *, names: Sequence[str] | None, wanted: Sequence[str]
) -> tuple[LabelTable, tuple[str, ...] | None, int]:
    """Read `labels.file`.

    Args:
        section: names file and columns.
        store: how the file is reached.
        names: of the classes, by number.
        wanted: splits of which a row has a label; none: all.

    Returns:
        The table, names of the classes as it has them (None: it has numbers), and the number of classes.

    Raises:
        ConfigError: the file cannot be understood, or gives one key two labels.
        StorageError: it cannot be read.
    """
    gathered = _Gathered(section, wanted)
    for row in _read_rows(section, store):
        gathered.add(*row)
    return gathered.close(names)


class _Gathered:
    """Rows as they come. Values are numbered as they are first met, and made classes at the end."""

    def __init__(self, section: LabelsSection, wanted: Sequence[str]) -> None:
        self._section, self._wanted = section, frozenset(wanted)
        self._by_column = len(section.label) > 1
        self._multi = self._by_column or section.multi_label or bool(section.separator)
        self._keys, self._codes, self._lines = array("Q"), array("i"), array("L")
        self._values: dict[object, int] = {}
        self._first_lines: list[int] = []
        self._sets: dict[tuple[int, ...], int] = {}
        self._splits: dict[str, None] = {}
        self._example = ""

    def add(self, line: int, key: object, cells: Sequence[object], split: object) -> None:
        """Take a row."""
        text = normalise_key(str(key if key is not None else ""))
        if not text.rpartition("/")[2]:
            raise self._refuse(f"line {line} has no key")
        self._example = self._example or text
        code = self._code(line, cells)
        if self._wanted:
            named = str(split if split is not None else "").strip()
            self._splits.setdefault(named)
            if named not in self._wanted:
                code = OTHER_SPLIT
        self._keys.append(hash_key(text))
        self._codes.append(code)
        self._lines.append(line)

    def _code(self, line: int, cells: Sequence[object]) -> int:
        if self._by_column:
            known = [self._read_cell(line, number, cell) for number, cell in enumerate(cells)]
            present = tuple(number for number in known if number is not None)
            return self._sets.setdefault(present, len(self._sets))
        (cell,) = cells
        if isinstance(cell, list) and not self._multi:
            reason = "holds lists; set labels.multi_label if an image may have several labels"
            raise ConfigError("labels.label", reason, value=self._section.label[0])
        parts = split_cell(cell, self._section.separator) if self._multi else [cell]
        numbers = {self._intern(line, part) for part in parts if not _is_empty(part)}
        if not numbers:
            return NO_LABEL
        if self._multi:
            return self._sets.setdefault(tuple(sorted(numbers)), len(self._sets))
        return numbers.pop()

    def _intern(self, line: int, value: object) -> int:
        value = value.strip() if isinstance(value, str) else value
        if value not in self._values:
            self._first_lines.append(line)
        return self._values.setdefault(value, len(self._values))

    def _read_cell(self, line: int, number: int, cell: object) -> int | None:
        """Return the number of a class that is present, ~number where nobody knows, None where it is not."""
        text = "" if cell is None else str(cell).strip()
        if text and text.removesuffix(".0") == self._section.unknown:
            return ~number
        if text in _PRESENT or text in _ABSENT:
            return number if text in _PRESENT else None
        raise self._refuse(f"line {line} has {text!r} where a class is 1 (present), 0 or -1")

    def close(self, names: Sequence[str] | None) -> tuple[LabelTable, tuple[str, ...] | None, int]:
        """Sort the rows and make values classes."""
        if not self._keys:
            raise self._refuse("has no rows")
        if self._wanted and not self._wanted & self._splits.keys():
            raise self._refuse_split()
        keys = np.frombuffer(self._keys, np.uint64)
        codes = np.frombuffer(self._codes, np.int32)
        keys, codes = self._unique(keys, codes)
        inferred: tuple[str, ...] | None
        if self._by_column:
            self._check_columns(names)
            inferred, classes = tuple(self._section.label), len(self._section.label)
            translation = np.arange(classes, dtype=np.int32)
        else:
            translation, inferred, classes = self._number_values(names)
        if not self._multi:
            codes = np.where(codes >= 0, translation[codes], codes)
            return self._table(keys, codes, ()), inferred, classes
        if self._by_column:
            return self._table(keys, codes, list(self._sets)), inferred, classes
        sets = [tuple(sorted({int(translation[value]) for value in values})) for values in self._sets]
        return self._table(keys, codes, sets), inferred, classes

    def _table(
        self, keys: NDArray[np.uint64], codes: NDArray[np.int32], sets: Sequence[tuple[int, ...]]
    ) -> LabelTable:
        starts = np.cumsum([0, *map(len, sets)], dtype=np.int64)
        members = np.fromiter((number for each in sets for number in each), np.int32, int(starts[-1]))
        return LabelTable(keys, codes.astype(np.int32), starts, members, self._multi, self._example)

    def _unique(
        self, keys: NDArray[np.uint64], codes: NDArray[np.int32]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        """Sort by key; a key that comes again must have the same label."""
        order = np.argsort(keys, kind="stable")
        keys, codes = keys[order], codes[order]
        repeated = keys[1:] == keys[:-1]
        if (differing := np.flatnonzero(repeated & (codes[1:] != codes[:-1]))).size:
            one, other = (self._lines[order[differing[0] + step]] for step in (0, 1))
            raise self._refuse(f"lines {one} and {other} give one key two labels or splits")
        kept = np.concatenate([[True], ~repeated])
        return keys[kept], codes[kept]

    def _check_columns(self, names: Sequence[str] | None) -> None:
        if names is not None and list(names) != list(self._section.label):
            reason = "the columns of labels.label are the classes' names; leave it out"
            raise ConfigError("labels.names", reason)

    def _number_values(
        self, names: Sequence[str] | None
    ) -> tuple[NDArray[np.int32], tuple[str, ...] | None, int]:
        """Return the class of every value, names of classes that were inferred, and their number."""
        values = list(self._values)
        numbers = [as_number(value) for value in values]
        if names is not None:
            known = {name: number for number, name in enumerate(names)}
            classes = len(names)
            found = [known.get(str(value), number) for value, number in zip(values, numbers, strict=True)]
            self._check_range(found, classes, "is no name of labels.names and no number below its length")
            return np.array(found, np.int32), None, classes
        if not any(number is not None for number in numbers):
            inferred = tuple(sorted(map(str, values)))
            known = {name: number for number, name in enumerate(inferred)}
            return np.array([known[str(value)] for value in values], np.int32), inferred, len(inferred)
        limit = self._section.classes or MOST_CLASSES
        self._check_range(numbers, limit, "is no class number, as others are (labels.names numbers names)")
        return np.array(numbers, np.int32), None, self._section.classes or max(map(int, numbers)) + 1  # type: ignore[arg-type]

    def _check_range(self, numbers: Sequence[int | None], classes: int, reason: str) -> None:
        for place, (value, number) in enumerate(zip(self._values, numbers, strict=True)):
            line = self._first_lines[place]
            if number is None:
                raise self._refuse(f"line {line}: {value!r} {reason}")
            if number < 0:
                reason = "is no class number; leave the cell empty where there is no label"
                raise self._refuse(f"line {line}: {value!r} {reason}")
            if number >= classes:
                raise self._refuse(
                    f"line {line}: class {number} where there are {classes} (0 to {classes - 1})"
                )

    def _refuse_split(self) -> ConfigError:
        found = _show(list(self._splits))
        wanted = " or ".join(sorted(self._wanted))
        return ConfigError(
            "labels.split",
            f"no row of {redact(self._section.file)} is {wanted}; there are {found} (labels.train_split, "
            "labels.val_split and labels.test_split say what they are called)",
            value=self._section.split,
        )

    def _refuse(self, reason: str) -> ConfigError:
        return ConfigError(_FILE, f"{redact(self._section.file)}: {reason}")


Row = tuple[int, object, Sequence[object], object]


def _read_rows(section: LabelsSection, store: Store) -> Iterator[Row]:
    """Yield line number, key, labels and split of every row; lines count from 1, the header's."""
    data, shown = store.read(section.file), redact(section.file)
    if not data.strip():
        raise ConfigError(_FILE, f"{shown} is empty")
    if data.startswith(_PARQUET):
        yield from _read_parquet(data, section)
        return
    source: BinaryIO = io.BytesIO(data)
    if data.startswith(_GZIP):
        source = cast("BinaryIO", gzip.GzipFile(fileobj=source))
    lines = io.TextIOWrapper(source, "utf-8-sig", newline="")
    number = [0]
    try:
        yield from _read_csv(lines, section, number)
    except UnicodeDecodeError:
        raise ConfigError(_FILE, f"{shown} is not UTF-8 text: line {_find_undecodable(data)}") from None
    except csv.Error as error:
        raise ConfigError(_FILE, f"{shown}: line {number[0] + 1} is no CSV ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(_FILE, f"{shown} is damaged ({error})") from None


def _find_undecodable(data: bytes) -> int:
    """Return the line with the first byte that is no UTF-8."""
    plain = gzip.decompress(data) if data.startswith(_GZIP) else data
    try:
        plain.decode()
    except UnicodeDecodeError as error:
        return plain.count(b"\n", 0, error.start) + 1
    raise AssertionError("it was decoded in vain before")


def _read_csv(lines: io.TextIOWrapper, section: LabelsSection, number: list[int]) -> Iterator[Row]:
    header = lines.readline()
    delimiter = max(_DELIMITERS, key=header.count)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    key, *labels = (_column(section, columns, name, option) for name, option in _wanted_columns(section))
    split = labels.pop() if section.split else None
    number[0] = 1
    reader = csv.reader(lines, delimiter=delimiter)
    for row in reader:
        number[0] = line = reader.line_num + 1
        if not row:
            continue
        if len(row) != len(columns):
            reason = f"line {line} has {len(row)} columns, the header {len(columns)}"
            raise ConfigError(_FILE, f"{redact(section.file)}: {reason}")
        yield line, row[key], [row[place] for place in labels], row[split] if split is not None else None


def _read_parquet(data: bytes, section: LabelsSection) -> Iterator[Row]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an optional dependency
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        reason = "parquet files need pyarrow: pip install 'streamswav[embed]', or give a CSV file"
        raise ConfigError(_FILE, reason, value=redact(section.file)) from None
    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        columns = list(file.schema_arrow.names)
        wanted = [
            columns[_column(section, columns, name, option)] for name, option in _wanted_columns(section)
        ]
        line = 0
        for batch in file.iter_batches(columns=list(dict.fromkeys(wanted))):
            parts = {name: batch.column(name).to_pylist() for name in dict.fromkeys(wanted)}
            for row in zip(*(parts[name] for name in wanted), strict=True):
                line += 1
                key, *labels = row
                split = labels.pop() if section.split else None
                yield line, key, labels, split
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(_FILE, f"{redact(section.file)} is no parquet file ({reason})") from None


def _wanted_columns(section: LabelsSection) -> list[tuple[str, str]]:
    """Names of columns with the option that names each: key, labels, and last the split."""
    labels = [(name, "labels.label") for name in section.label]
    split = [(section.split, "labels.split")] if section.split else []
    return [(section.key, "labels.key"), *labels, *split]


def _column(section: LabelsSection, columns: Sequence[str], name: str, option: str) -> int:
    if columns.count(name) > 1:
        raise ConfigError(option, f"{redact(section.file)} has this column twice", value=name)
    if name not in columns:
        reason = f"{redact(section.file)} has no such column; there are {_show(columns)}"
        raise ConfigError(option, reason, value=name)
    return columns.index(name)


def _show(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _is_empty(value: object) -> bool:
    return value is None or str(value).strip() in ("", "nan")
