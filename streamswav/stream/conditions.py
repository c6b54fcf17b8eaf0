"""What `stream.where` may say of a sample: conditions `FIELD OP VALUE`, and functions of installed packages.

    json.width >= 256    json.a.b == text    label not in [3, 7]    bytes < 2e6    package.module:function

FIELD is `json.A.B` (of the sample's JSON sidecar), `label` (its `.cls` member), or of its image `bytes`
(encoded), `width`, `height` and `pixels` (from the header, undecoded). OP is one of == != < <= > >= in, not
in. VALUE is YAML 1.2: a number, text, true, false, null or a list.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import yaml

from streamswav.errors import ConfigError, DecodeError
from streamswav.stream.tar import label_of

KEY = "stream.where"

SizeOf = Callable[[bytes], tuple[int, int]]
"""Reads (height, width) from an image's header; raises `DecodeError` where it cannot."""

_IMAGE_FIELDS = ("bytes", "width", "height", "pixels")
_FIELDS = (*_IMAGE_FIELDS, "label", "json.KEY")
_CONDITION = re.compile(r"\s*([^\s=!<>]+)(?:\s*(==|!=|<=|>=|<|>)|\s+(not\s+in|in)\b)(.*)", re.DOTALL)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_REASON_LENGTH = 60


@dataclass(frozen=True)
class Candidate:
    """A sample that is judged, as functions of `stream.where` see it.

    Attributes:
        key: its name in the tar.
        members: bytes by extension.
        image: bytes of its image, or None.
        size_of: reads an image's header.
    """

    key: str
    members: Mapping[str, bytes]
    image: bytes | None
    size_of: SizeOf

    @property
    def label(self) -> int | str | None:
        """Content of the `.cls` member, a number where it is one, or None."""
        return label_of(self.members)

    @cached_property
    def sidecar(self) -> object:
        """What the `.json` member says; None where there is none that can be read."""
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(self.members["json"]) if "json" in self.members else None
        return None

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image, from its header.

        Raises:
            DecodeError: there is no image, or its header cannot be read.
        """
        if self.image is None:
            raise DecodeError("no_image")
        return self.size_of(self.image)


@dataclass(frozen=True)
class Function:
    """A predicate `package.module:function` of an installed package; pickled by its name."""

    text: str

    def __reduce__(self) -> tuple[type[Function], tuple[str]]:
        return Function, (self.text,)

    @cached_property
    def call(self) -> Callable[[Candidate], object]:
        """The function itself, imported when it is first asked for.

        Raises:
            ConfigError: it cannot be imported.
        """
        module, _, path = self.text.partition(":")
        try:
            found = operator.attrgetter(path)(importlib.import_module(module))
        # A module that is imported runs: whatever it raises is its user's to see, in one line.
        except Exception as error:
            reason = f"cannot be imported ({_told(error)}); is its package installed here?"
            raise ConfigError(KEY, reason, value=self.text) from None
        return found  # type: ignore[no-any-return]  # what it takes and gives shows when it is called

    def judge(self, sample: Candidate) -> str | None:
        """Return why the sample is not trained; None to train it, as where the image's size cannot be read.

        Raises:
            ConfigError: the function raised anything but `DecodeError`.
        """
        call = self.call
        try:
            return None if call(sample) else shorten(self.text)
        except DecodeError:
            return None
        except Exception as error:
            reason = f"raised {_told(error)} on the sample {sample.key!r}"
            raise ConfigError(KEY, reason, value=self.text) from None


@dataclass(frozen=True)
class Condition:
    """`FIELD OP VALUE`, taken apart; `tokens` are what == and `in` look for."""

    text: str
    name: str
    sign: str
    value: Any
    tokens: frozenset[object]

    def judge(self, sample: Candidate) -> str | None:
        """Return why the sample is not trained; None to train it.

        What is asked of an image holds where there is none that can be read: decoding will tell why.
        """
        try:
            found = _read(sample, self.name)
        except LookupError:
            return shorten(f"missing {self.name}")
        except DecodeError:
            return None
        if self.sign in _ORDER:
            if _kind(found) != _kind(self.value):
                return shorten(f"incomparable {self.name}")
            holds = _ORDER[self.sign](found, self.value)
        else:
            holds = (_token(found) in self.tokens) == (self.sign in ("==", "in"))
        return None if holds else shorten(self.text)


def parse(text: str) -> Condition | Function:
    """Read one entry of `stream.where`.

    Raises:
        ConfigError: it is none, or cannot be imported; the error names it and what is wrong.
    """
    given, text = text, " ".join(text.split())
    if _FUNCTION.fullmatch(text):
        function = Function(text)
        if not callable(function.call):
            raise ConfigError(KEY, "is not a function", value=text)
        return function
    match = _CONDITION.fullmatch(given)
    if not match:
        reason = "is no condition FIELD OP VALUE (OP is ==, !=, <, <=, >, >=, in, not in) or module:function"
        raise ConfigError(KEY, reason, value=text)
    name, sign, word, source = match.groups()
    sign = sign or " ".join(word.split())
    if not (name in (*_IMAGE_FIELDS, "label") or re.fullmatch(r"json(\.[^.]+)+", name)):
        _refuse_field(text, name)
    value, several = _value(text, source), sign in ("in", "not in")
    if several and not isinstance(value, list):
        raise ConfigError(KEY, f"{sign!r} wants a list, as [1, 2]", value=text)
    if sign in _ORDER and _kind(value) not in ("number", "text"):
        raise ConfigError(KEY, f"{sign!r} wants a number or text", value=text)
    return Condition(text, name, sign, value, frozenset(map(_token, value if several else [value])))


def shorten(text: str) -> str:
    """Return a label fit for a metric: at most 60 characters."""
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


def _refuse_field(text: str, name: str) -> NoReturn:
    nearest = difflib.get_close_matches(name, _FIELDS, 1)
    reason = f"there is no field {name!r}, but {', '.join(_FIELDS)}"
    raise ConfigError(KEY, reason, value=text, nearest=nearest[0] if nearest else None)


def _value(text: str, source: str) -> Any:
    try:
        value = yaml.load(source, _Values)  # noqa: S506 - a SafeLoader
        _token(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(KEY, "its value is not YAML (put text in quotes)", value=text) from None
    if not source.strip():
        raise ConfigError(KEY, "has no value", value=text)
    return value


def _read(sample: Candidate, name: str) -> object:
    """Read a field.

    Raises:
        LookupError: there is none.
        DecodeError: it is one of an image, and there is none that can be read.
    """
    if name.startswith("json."):
        found: Any = sample.sidecar
        for part in name.split(".")[1:]:
            if not isinstance(found, dict):
                raise KeyError(part)
            found = found[part]
        return found
    if name == "label":
        if sample.label is None:
            raise KeyError(name)
        return sample.label
    height, width = (0, 0) if name == "bytes" else sample.size
    if sample.image is None:
        raise DecodeError("no_image")
    return {"bytes": len(sample.image), "height": height, "width": width, "pixels": height * width}[name]


def _kind(value: object) -> str:
    """Values of one kind compare: `True` is no number, whatever Python says."""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__


def _token(value: object) -> object:
    """Something hashable that is equal for equal values."""
    if isinstance(value, list):
        return "list", tuple(map(_token, value))
    if isinstance(value, dict):
        return "dict", frozenset((key, _token(held)) for key, held in value.items())
    return _kind(value), value


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


class _Values(yaml.SafeLoader):
    """YAML 1.2's core: unlike in 1.1, `no` and 2024-01-31 are text, and 1e6 and 010 are numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's way


def _whole(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, 16 if "x" in node.value else 10)


for _tag, _pattern, _starts in (
    ("null", r"(~|null|Null|NULL|)\Z", [*"~nN", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)\Z", [*"tTfF"]),
    ("int", r"([-+]?[0-9]+|0x[0-9a-fA-F]+)\Z", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z", [*"-+.0123456789"]),
):
    _Values.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _starts)
_Values.add_constructor("tag:yaml.org,2002:int", _whole)
