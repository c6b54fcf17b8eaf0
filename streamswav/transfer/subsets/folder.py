"""The folder of a subset: shards, `_stats.json`, `classes.json`, and last `subset.json`: then it is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamswav.errors import ConfigError, NotFoundError
from streamswav.stream.manifest import STATS_FILE
from streamswav.stream.store import Store, join, redact

SUBSET_FILE = "subset.json"
CLASSES_FILE = "classes.json"

_BEGUN_FILE = "subset.begun.json"
_OURS = re.compile(r"subset-\d{6,}\.tar")
_FILES = (SUBSET_FILE, _BEGUN_FILE, STATS_FILE, CLASSES_FILE)


@dataclass(frozen=True)
class Subset:
    """A subset that lies in its folder, whole.

    Attributes:
        urls: what to read, as `stream.urls` has it.
        digest: of the request, the shards it was drawn from, and the labels.
        samples: their number.
        counts: samples by class.
        short: classes that have fewer than n, and how many they have.
        missing: listed keys that are not in the shards.
        skipped: samples that were left out for want of a label or an image, and damages, by reason.
    """

    urls: tuple[str, ...]
    digest: str
    samples: int
    counts: Mapping[int, int]
    short: Mapping[int, int]
    missing: int
    skipped: Mapping[str, int]


def shard_name(number: int) -> str:
    """Return the name of a subset's shard."""
    return f"subset-{number:06d}.tar"


def begin_subset(target: str, store: Store, about: Mapping[str, str]) -> None:
    """Mark that a subset is being drawn; a folder that cannot be written shows before the work does."""
    store.write(join(target, _BEGUN_FILE), encode(about))


def find_subset(target: str, store: Store, *, digest: str, option: str) -> Subset | None:
    """Return the subset that lies in a folder, if it is this one and whole; None where it is yet to be drawn.

    Raises:
        ConfigError: under the name `option`: something else lies there.
    """
    found = _list(target, store)
    if foreign := [name for name in found if name not in _FILES and not _OURS.fullmatch(name)]:
        reason = f"{redact(target)} holds other things, as {foreign[0]}; give an empty folder"
        raise ConfigError(option, reason)
    if SUBSET_FILE not in found:
        return None
    try:
        values = json.loads(store.read(join(target, SUBSET_FILE)))
        subset, about = _from_json(values, target), str(values["request"])
        whole = {name: int(each["bytes"]) for name, each in values["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if subset.digest != digest:
        changed = (
            "or was drawn from other shards, versions of them or labels; delete it or give another folder"
        )
        raise ConfigError(option, f"the subset in {redact(target)} is another ({about}), {changed}")
    return subset if whole.items() <= found.items() else None


def commit_subset(
    target: str, store: Store, values: Mapping[str, Any], names: tuple[str, ...] | None
) -> Subset:
    """Clear away what an unfinished subset left, and say last of all that this one is whole.

    Args:
        target: folder.
        store: how it is reached.
        values: content of `subset.json`.
        names: of the classes.
    """
    for name in _list(target, store):
        if _OURS.fullmatch(name) and name not in values["shards"]:
            store.delete(join(target, name))
    store.write(join(target, STATS_FILE), encode({name: values[name] for name in ("samples", "shards")}))
    if names:
        store.write(join(target, CLASSES_FILE), encode(names))
    store.write(join(target, SUBSET_FILE), encode(values))
    store.delete(join(target, _BEGUN_FILE))
    return _from_json(values, target)


def encode(values: Any) -> bytes:
    """Return JSON that people can read."""
    return (json.dumps(values, indent=1) + "\n").encode()


def _list(target: str, store: Store) -> dict[str, int]:
    """Return sizes by name."""
    try:
        return {info.url[len(join(target, "")) :]: info.size for info in store.list(target)}
    except NotFoundError:
        return {}


def _from_json(values: Mapping[str, Any], target: str) -> Subset:
    counts, short = (
        {int(number): count for number, count in values[name].items()} for name in ("counts", "short")
    )
    return Subset(
        (target,),
        values["digest"],
        int(values["samples"]),
        counts,
        short,
        values["missing"],
        values["skipped"],
    )
