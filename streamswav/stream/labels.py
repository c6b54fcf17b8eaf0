"""Labels of samples: from a member of the sample itself, or by its key from a table beside the shards.

A label is a class number, or with several labels an image the growing class numbers that it has. Where the
source has class names, `labels.names` numbers them; in a table they are otherwise numbered as they sort.
How a sample is found in a table is told in `key_table`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamswav.config import LabelsSection
from streamswav.errors import ConfigError, DecodeError
from streamswav.stream.label_table import (
    NO_LABEL,
    OTHER_SPLIT,
    LabelTable,
    as_number,
    read_table,
    split_cell,
)
from streamswav.stream.redaction import is_tombstone
from streamswav.stream.store import Store, redact

Label = int | tuple[int, ...]

_JSON = "json."
_NO_NUMBER = "label_not_a_class_number"


@dataclass(frozen=True, eq=False)
class Labels:
    """Tells the label of a sample. Small, and pickled with about 12 bytes a key of its table.

    Attributes:
        classes: number of classes; None where only the samples know.
        names: of the classes, by number, where they have any.
        multi: whether an image may have several labels; its label is then a tuple.
        member: of the sample, that holds its label: an extension, or `json.A.B`. Not used with a table.
        separator: of several labels in one text.
        table: labels by key.
    """

    classes: int | None = None
    names: tuple[str, ...] | None = None
    multi: bool = False
    member: str = "cls"
    separator: str = ""
    table: LabelTable | None = None
    _numbers: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        numbers = {name: number for number, name in enumerate(self.names or ())}
        object.__setattr__(self, "_numbers", numbers)

    @staticmethod
    def from_shards() -> Labels:
        """Return the labels of the samples' `.cls` members, as webdataset writes them: class numbers."""
        return Labels()

    def of(self, key: str, members: Mapping[str, bytes]) -> Label:
        """Return a sample's class number, or with `multi` the numbers of its classes.

        A class of which nobody knows is ~number there (`labels.unknown`).

        Args:
            key: of the sample.
            members: its bytes by extension.

        Raises:
            DecodeError: it has none. The reason is `no_label`, `redacted`, `label_not_a_class_number` (which
                also stands for a name that is none of the classes') or `other_split`.
        """
        if is_tombstone(members):
            raise DecodeError("redacted")
        if self.table is not None:
            return self._look_up(self.table, key)
        value = self._read(members)
        parts = split_cell(value, self.separator) if self.multi else [value]
        numbers = {self._number(part) for part in parts}
        return tuple(sorted(numbers)) if self.multi else numbers.pop()

    @property
    def says_more_than_cls(self) -> bool:
        """Whether a single label is not simply the number in the `.cls` member."""
        return not self.multi and (self.table is not None or self.names is not None or self.member != "cls")

    @property
    def digest(self) -> str:
        """Short hash over all that decides labels."""
        whole = hashlib.blake2b(digest_size=8)
        about = [self.classes, self.names, self.multi, self.member, self.separator]
        whole.update(json.dumps(about).encode())
        if self.table is not None:
            for array in (self.table.keys, self.table.codes, self.table.starts, self.table.members):
                whole.update(array.tobytes())
        return whole.hexdigest()

    @property
    def needed(self) -> str:
        """What a sample must have to be labelled, for the message where none is."""
        if self.table is not None:
            return (
                f"a labelled sample's key is in labels.file, which has {len(self.table.keys):,} keys "
                f"such as {self.table.example!r}"
            )
        what = "class number or a name of labels.names" if self.names else "class number"
        hint = "" if self.names else " (class names are numbered by labels.names)"
        if self.member.startswith(_JSON):
            return f"a labelled sample has its {what} at {self.member.removeprefix(_JSON)} of its .json{hint}"
        if self.member == "cls" and not self.names:
            return "a labelled sample has a .cls member that holds its class number, as webdataset writes it"
        return f"a labelled sample has a .{self.member} member that holds its {what}{hint}"

    def _look_up(self, table: LabelTable, key: str) -> Label:
        code = table.find(key)
        if code == NO_LABEL:
            raise DecodeError("no_label")
        if code == OTHER_SPLIT:
            raise DecodeError("other_split")
        return table.classes_of(code) if self.multi else code

    def _read(self, members: Mapping[str, bytes]) -> object:
        """Return what the member says: text, or what a place of the .json holds.

        Raises:
            DecodeError: there is none.
        """
        if not self.member.startswith(_JSON):
            data = members.get(self.member)
            if data is None:
                raise DecodeError("no_label")
            return data.decode("utf-8", "replace").strip()
        try:
            found: Any = json.loads(members["json"])
            for part in self.member.split(".")[1:]:
                found = found[part]
        except (LookupError, TypeError, ValueError, RecursionError):
            raise DecodeError("no_label") from None
        if found is None:
            raise DecodeError("no_label")
        return found

    def _number(self, value: object) -> int:
        """Return the class of a name or number.

        Raises:
            DecodeError: it is neither.
        """
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        number = as_number(value)
        if number is None or number < 0 or (self.classes is not None and number >= self.classes):
            raise DecodeError(_NO_NUMBER)
        return number


def load_labels(section: LabelsSection, store: Store, *, split: str | Sequence[str] = "") -> Labels:
    """Read what the configuration says of labels.

    Args:
        section: says where they are.
        store: how files are reached.
        split: only samples of this split have a label: `train`, `val`, `test` stand for what the section
            calls them, anything else, and a list, for itself. Without a column of splits all samples are in
            every split.

    Raises:
        ConfigError: a table or a list of names that cannot be understood, with the line.
        StorageError: a file that cannot be read.
    """
    names = _read_names(section.names, store) if section.names else None
    if names and section.classes and section.classes != len(names):
        reason = f"labels.names has {len(names)} names; leave it out"
        raise ConfigError("labels.classes", reason, value=section.classes)
    if section.file:
        wanted = _split_values(section, split) if section.split else ()
        table, inferred, classes = read_table(section, store, names=names, wanted=wanted)
        return Labels(classes, names or inferred, table.multi, table=table, separator=section.separator)
    multi = section.multi_label or bool(section.separator)
    known = len(names) if names else section.classes
    return Labels(known, names, multi, section.member, section.separator)


def _split_values(section: LabelsSection, split: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(split, str):
        return tuple(split)
    known = {"": [], "train": section.train_split, "val": section.val_split, "test": section.test_split}
    return tuple(known.get(split, [split]))


def _read_names(url: str, store: Store) -> tuple[str, ...]:
    """Read class names: one a line, a JSON list, or a JSON object of names and numbers."""
    try:
        text = store.read(url).decode("utf-8-sig")
        values: Any = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.splitlines()
    except UnicodeDecodeError:
        raise ConfigError("labels.names", f"{redact(url)} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("labels.names", f"{redact(url)} is not JSON ({error})") from None
    if isinstance(values, dict):
        numbers = {str(name): as_number(number) for name, number in values.items()}
        if set(numbers.values()) != set(range(len(values))):
            reason = f"{redact(url)} must number its {len(values)} names from 0 to {len(values) - 1}"
            raise ConfigError("labels.names", reason)
        values = sorted(numbers, key=lambda name: numbers[name] or 0)
    names = tuple(name for each in values if (name := str(each).strip()))
    if not names:
        raise ConfigError("labels.names", f"{redact(url)} has no names; write one a line")
    if len(set(names)) != len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ConfigError("labels.names", f"{redact(url)} has {twice!r} twice")
    return names
