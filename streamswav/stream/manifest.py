"""The manifest: which shards there are, listed once, sorted, with an identity that survives a move.

A shard is identified by the hash of its key (its path below the common root of all URLs) and its size; the
version tag (ETag, else Last-Modified or mtime) is kept beside it and compared on every read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import braceexpand

from streamswav.errors import ManifestError, NotFoundError, StorageError
from streamswav.stream.store import ObjectInfo, Store, fixed_part, is_pattern, join, redact

STATS_FILE = "_stats.json"

_HEAD_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. `key` is its path below the manifest's root, `size` is in bytes."""

    key: str
    url: str
    size: int
    version: str

    @property
    def digest(self) -> int:
        """64 bits that identify the shard wherever it lies."""
        text = f"{self.key}\0{self.size}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Manifest:
    """All shards of a run, sorted by key.

    Attributes:
        shards: every shard once.
        samples: number of samples where the producers' `_stats.json` files tell it for all shards.
    """

    shards: tuple[Shard, ...]
    samples: int | None = None

    @cached_property
    def digest(self) -> str:
        """Hash over keys and sizes, in order."""
        whole = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            whole.update(f"{shard.key}\0{shard.size}\n".encode())
        return whole.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads."""
        rows = [[shard.key, redact(shard.url), shard.size, shard.version] for shard in self.shards]
        return {"digest": self.digest, "samples": self.samples, "shards": rows}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Manifest:
        """Read what `to_json` gave."""
        return Manifest(tuple(Shard(*row) for row in values["shards"]), values["samples"])


def list_manifest(urls: Sequence[str], store: Store) -> Manifest:
    """List the shards behind `urls`, once.

    Args:
        urls: prefixes (all `.tar` objects below), globs, brace patterns (`{000..123}`), single tars, or
            `@FILE`: a local or remote file with one of these a line.
        store: where to look.

    Raises:
        ManifestError: nothing was found, or one shard twice.
        StorageError: a location that cannot be listed.
    """
    found: list[ObjectInfo] = []
    patterns = [each for url in _expand_lists(urls, store) for each in _expand_braces(url)]
    for pattern, objects in zip(patterns, _list_patterns(patterns, store), strict=True):
        if not objects:
            raise ManifestError(
                f"{redact(pattern)}: no .tar objects there; check the prefix and its spelling"
            )
        found += objects
    # From what was asked for, not from what was found: a new folder must not rename the shards of others.
    root = _common_root([_folder_of(pattern) for pattern in patterns])
    shards = sorted((_name_shard(info, root) for info in found), key=_key)
    for one, other in itertools.pairwise(shards):
        if one.key == other.key:
            raise ManifestError(f"{redact(one.url)}: named twice by stream.urls; make the patterns disjoint")
    return Manifest(tuple(shards), _count_samples(shards, store))


def _key(shard: Shard) -> str:
    return shard.key


def _expand_lists(urls: Iterable[str], store: Store) -> Iterator[str]:
    for url in urls:
        if not url.startswith("@"):
            yield url
            continue
        lines = [line.strip() for line in store.read(url[1:]).decode("utf-8", "replace").splitlines()]
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise ManifestError(f"{redact(url[1:])}: the list names no shards; write one pattern a line")
        yield from listed


def _name_shard(info: ObjectInfo, root: str) -> Shard:
    # A signed link's query is no part of what it names, and no business of a manifest's reader.
    return Shard(redact(info.url).removeprefix(root), info.url, info.size, info.version)


def _list_patterns(patterns: Sequence[str], store: Store) -> Iterator[list[ObjectInfo]]:
    """Yield what each pattern stands for; objects that are named one by one are asked for side by side."""
    with ThreadPoolExecutor(_HEAD_REQUESTS_AT_ONCE) as pool:
        asked = {each: pool.submit(store.info, each) for each in patterns if _names_one(each)}
        for each in patterns:
            if each in asked:
                yield [asked[each].result()]
                continue
            objects = store.glob(each) if is_pattern(each) else store.list(each)
            yield [info for info in objects if info.url.endswith(".tar")]


def _names_one(pattern: str) -> bool:
    return redact(pattern).endswith(".tar") and not is_pattern(pattern)


def _folder_of(pattern: str) -> str:
    """The folder that a pattern is fixed to."""
    if is_pattern(pattern):
        return fixed_part(pattern)[0]
    return posixpath.dirname(redact(pattern)) if _names_one(pattern) else pattern.rstrip("/")


def _expand_braces(url: str) -> list[str]:
    if "{" not in url:
        return [url]
    try:
        return list(braceexpand.braceexpand(url))
    except ValueError:
        raise ManifestError(f"{redact(url)}: the braces of this pattern do not match") from None


def _common_root(folders: Sequence[str]) -> str:
    root = posixpath.commonprefix(folders)
    if any(folder != root and not folder.startswith(root + "/") for folder in folders):
        root = posixpath.dirname(root)
    return root.rstrip("/") + "/" if root else ""


def _count_samples(shards: Sequence[Shard], store: Store) -> int | None:
    """Add up the producers' counts; None unless they cover every shard."""
    names: dict[str, list[str]] = {}
    for shard in shards:
        folder, name = posixpath.split(redact(shard.url))
        names.setdefault(folder, []).append(name)
    total = 0
    for folder, held in names.items():
        counts = _read_counts(folder, store)
        if not counts.keys() >= set(held):
            return None
        total += sum(counts[name] for name in held)
    return total


def _read_counts(folder: str, store: Store) -> dict[str, int]:
    """Samples by shard name, from `_stats.json`; empty where there is none that can be understood."""
    try:
        stats = json.loads(store.read(join(folder, STATS_FILE)))
        return {name: int(entry["samples"]) for name, entry in stats["shards"].items()}
    except NotFoundError:
        return {}
    except (StorageError, ValueError, KeyError, TypeError, AttributeError):
        return {}
