"""The manifest: which shards there are, listed once, sorted, with an identity that survives a move.

A shard is identified by the hash of its key (its path below the common root of all URLs) and its size; the
version tag (ETag, else Last-Modified or mtime) is kept beside it and compared on every read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import braceexpand

from streamswav.errors import ManifestError, NotFoundError, StorageError
from streamswav.philox import words
from streamswav.stream.store import ObjectInfo, Store, fixed_part, is_pattern, join, redact

STATS_FILE = "_stats.json"

_HEAD_REQUESTS_AT_ONCE = 16
_MOST_STATS_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. `key` is its path below the manifest's root, `size` is in bytes, `source` counts the URLs."""

    key: str
    url: str
    size: int
    version: str
    source: int = 0

    @property
    def digest(self) -> int:
        """64 bits that identify the shard wherever it lies."""
        text = f"{self.key}\0{self.size}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Manifest:
    """All shards of a run: those it began with, sorted by key, then what came later, part by part.

    Attributes:
        shards: every shard once.
        counts: number of samples of each source, None where the producers' `_stats.json` files do not tell.
        parts: number of shards in each part; a run whose stream does not grow has one part.
    """

    shards: tuple[Shard, ...]
    counts: tuple[int | None, ...] = (None,)
    parts: tuple[int, ...] = ()

    @cached_property
    def chain(self) -> tuple[str, ...]:
        """A hash over keys and sizes for the first part, the first two, and so on, each hash in the next."""
        digests: list[str] = []
        at = 0
        for count in self.parts or (len(self.shards),):
            whole = hashlib.blake2b("".join(digests[-1:]).encode(), digest_size=16)
            for shard in self.shards[at : at + count]:
                whole.update(f"{shard.key}\0{shard.size}\n".encode())
            at += count
            digests.append(whole.hexdigest())
        return tuple(digests)

    @property
    def digest(self) -> str:
        """Hash over all parts."""
        return self.chain[-1]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def samples(self) -> int | None:
        """Samples of all shards, each once, where that is known."""
        return self.total((1,) * len(self.counts))

    def total(self, passes: Sequence[int]) -> int | None:
        """Samples of a run with so many passes over each source, where that is known."""
        if any(count is None for count in self.counts):
            return None
        return sum((count or 0) * each for count, each in zip(self.counts, passes, strict=True))

    def total_bytes(self, passes: Sequence[int]) -> int:
        """Bytes of the shards of a run with so many passes over each source."""
        return sum(shard.size * passes[shard.source] for shard in self.shards)

    def of_turn(self, turn: int, passes: Sequence[int], *, seed: int, covered: int) -> tuple[int, ...]:
        """Return which of the first `covered` shards a pass reads, growing.

        Every shard comes in as many passes of the run as its source has. A source with fewer of them than
        another has its shards spread over the run, so that each pass is a mixture of all sources.

        Args:
            turn: the pass, from 0.
            passes: of each source.
            seed: of the order.
            covered: number of shards that the position knows.
        """
        turns = max(passes)
        if min(passes) == turns:
            return tuple(range(covered))
        offsets = words(covered, "turns", seed)
        return tuple(
            index
            for index in range(covered)
            if _comes(turn - int(offsets[index] % turns), passes[self.shards[index].source], turns)
        )

    def covered(self, digest: str) -> int | None:
        """Return how many shards the hash stands for; None if it is none of the chain."""
        if digest not in self.chain:
            return None
        return sum((self.parts or (len(self.shards),))[: self.chain.index(digest) + 1])

    def grown(self, shards: Sequence[Shard], counts: Sequence[int | None]) -> Manifest:
        """Return the manifest with one part more."""
        parts = (*(self.parts or (len(self.shards),)), len(shards))
        return Manifest((*self.shards, *shards), tuple(counts), parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads."""
        rows = [
            [shard.key, redact(shard.url), shard.size, shard.version, shard.source] for shard in self.shards
        ]
        return {"digest": self.digest, "counts": self.counts, "parts": self.parts, "shards": rows}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Manifest:
        """Read what `to_json` gave."""
        shards = tuple(Shard(*row) for row in values["shards"])
        return Manifest(shards, tuple(values["counts"]), tuple(values["parts"]))


def _comes(turn: int, passes: int, turns: int) -> bool:
    """Tell whether a shard whose first pass is turn 0 comes in this one (mod `turns`), evenly spread."""
    place = turn % turns
    return place * passes // turns != (place - 1) * passes // turns if place else True


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
    found: list[tuple[ObjectInfo, int]] = []
    asked = [
        (each, source)
        for source, url in enumerate(urls)
        for line in _expand_lists(url, store)
        for each in _expand_braces(line)
    ]
    patterns = [pattern for pattern, _ in asked]
    for (pattern, source), objects in zip(asked, _list_patterns(patterns, store), strict=True):
        if not objects:
            raise ManifestError(
                f"{redact(pattern)}: no .tar objects there; check the prefix and its spelling"
            )
        found += ((info, source) for info in objects)
    # From what was asked for, not from what was found: a new folder must not rename the shards of others.
    root = _common_root([_folder_of(pattern) for pattern in patterns])
    shards = sorted((_name_shard(info, root, source) for info, source in found), key=_key)
    for one, other in itertools.pairwise(shards):
        if one.key == other.key:
            raise ManifestError(f"{redact(one.url)}: named twice by stream.urls; make the patterns disjoint")
    return Manifest(tuple(shards), count_samples(shards, len(urls), store))


def _key(shard: Shard) -> str:
    return shard.key


def _expand_lists(url: str, store: Store) -> list[str]:
    if not url.startswith("@"):
        return [url]
    lines = [line.strip() for line in store.read(url[1:]).decode("utf-8", "replace").splitlines()]
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise ManifestError(f"{redact(url[1:])}: the list names no shards; write one pattern a line")
    return listed


def _name_shard(info: ObjectInfo, root: str, source: int) -> Shard:
    # A signed link's query is no part of what it names, and no business of a manifest's reader.
    return Shard(redact(info.url).removeprefix(root), info.url, info.size, info.version, source)


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


def count_samples(shards: Sequence[Shard], sources: int, store: Store) -> tuple[int | None, ...]:
    """Add up the producers' counts by source; None for one whose shards they do not all cover."""
    counts = _counts_by_folder(shards, store)
    if shards and counts[0] is None and _count_beside(shards[0], store) is not None:
        counts = _counts_beside(shards, store)
    totals: list[int | None] = [0] * sources
    for shard, count in zip(shards, counts, strict=True):
        total = totals[shard.source]
        totals[shard.source] = None if total is None or count is None else total + count
    return tuple(totals)


def _counts_by_folder(shards: Sequence[Shard], store: Store) -> list[int | None]:
    known: dict[str, dict[str, int]] = {}
    counts = []
    for shard in shards:
        folder, name = posixpath.split(redact(shard.url))
        if folder not in known:
            known[folder] = _read_counts(folder, store)
        counts.append(known[folder].get(name))
    return counts


def _counts_beside(shards: Sequence[Shard], store: Store) -> list[int | None]:
    """Counts as img2dataset leaves them, a file a shard; where these are too many to read, nobody counted."""
    if len(shards) > _MOST_STATS_FILES:
        return [None] * len(shards)
    with ThreadPoolExecutor(_HEAD_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(lambda shard: _count_beside(shard, store), shards))


def _count_beside(shard: Shard, store: Store) -> int | None:
    """`successes` of `00000_stats.json` beside `00000.tar`."""
    try:
        stats = json.loads(store.read(redact(shard.url).removesuffix(".tar") + STATS_FILE))
        return int(stats["successes"])
    except (StorageError, ValueError, KeyError, TypeError):
        return None


def _read_counts(folder: str, store: Store) -> dict[str, int]:
    """Samples by shard name, from `_stats.json`; empty where there is none that can be understood."""
    try:
        stats = json.loads(store.read(join(folder, STATS_FILE)))
        return {name: int(entry["samples"]) for name, entry in stats["shards"].items()}
    except NotFoundError:
        return {}
    except (StorageError, ValueError, KeyError, TypeError, AttributeError):
        return {}
