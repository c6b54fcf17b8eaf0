"""Taking samples out of shards, for whoever opted out, so that all others stay where they are.

The bytes of a sample become one member of zeros of the same length, a *tombstone*. Runs that have pinned the
shard's version go on by the record beside it (`streamswav.stream.redaction`). Interrupted anywhere, the same
command run again completes what was begun.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from shards.scan import read_shard
from streamswav.errors import ChangedError
from streamswav.stream.manifest import Shard
from streamswav.stream.redaction import (
    TOMBSTONE,
    Pending,
    Record,
    Redacted,
    hash_key,
    read_record,
    record_url,
)
from streamswav.stream.store import ObjectInfo, Store, redact
from streamswav.stream.tar import Damage

Key = tuple[str, str]
"""(shard key, or "" for every shard; sample key)."""

_BLOCK = 512
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Found:
    """What a shard holds of the samples that are looked for.

    Attributes:
        samples: those that are there, tombstones to be.
        keys: those samples' keys, and keys that were taken out before.
        damages: stretches that could not be searched.
        pending: an earlier redaction was interrupted.
    """

    samples: tuple[Redacted, ...]
    keys: frozenset[str]
    damages: tuple[Damage, ...]
    pending: bool


@dataclass(slots=True)
class Redactions:
    """What was done, or would be.

    Attributes:
        samples: how many, by URL of the shard; shards that hold none are left out.
        missing: keys that no shard holds or held.
        unsearched: (URL of the shard, damage) of bytes that may hold more.
    """

    samples: dict[str, int] = field(default_factory=dict)
    missing: list[Key] = field(default_factory=list)
    unsearched: list[tuple[str, Damage]] = field(default_factory=list)


def redact_samples(
    shards: Sequence[Shard],
    keys: Collection[Key],
    store: Store,
    *,
    dry_run: bool = False,
    workers: int = 1,
    on_shard: Callable[[], object] = lambda: None,
) -> Redactions:
    """Take the samples with these keys out of the shards.

    Args:
        shards: where to look. Where every key names its shard, only those are read.
        keys: what to look for.
        store: how the shards are reached.
        dry_run: only look.
        workers: shards that are searched side by side.
        on_shard: called after each shard that was read or passed over.

    Raises:
        ChangedError: a shard was written by someone else meanwhile.
        StorageError: a shard cannot be read or written.
    """
    named = {name for name, _ in keys}
    searched = [shard for shard in shards if "" in named or shard.key in named]
    for _ in range(len(shards) - len(searched)):
        on_shard()
    done, seen = Redactions(), set[Key]()
    for shard, found in _search(searched, keys, store, workers):
        if not dry_run and (found.samples or found.pending):
            rewrite(_info(shard), found.samples, store)
        if found.samples:
            done.samples[redact(shard.url)] = len(found.samples)
        done.unsearched += [(redact(shard.url), damage) for damage in found.damages]
        seen.update((name, key) for name in ("", shard.key) for key in found.keys)
        on_shard()
    done.missing = sorted(set(keys) - seen)
    return done


def _search(
    shards: Sequence[Shard], keys: Collection[Key], store: Store, workers: int
) -> Iterator[tuple[Shard, Found]]:
    """Yield what each shard holds. Threads, for it is waiting more than parsing."""
    by_shard: dict[str, set[str]] = {}
    for name, key in keys:
        by_shard.setdefault(name, set()).add(key)
    everywhere = by_shard.get("", set())

    def find(shard: Shard) -> tuple[Shard, Found]:
        within = by_shard.get(shard.key)
        return shard, find_samples(_info(shard), everywhere | within if within else everywhere, store)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(find, shards)


def _info(shard: Shard) -> ObjectInfo:
    return ObjectInfo(shard.url, shard.size, shard.version)


def find_samples(info: ObjectInfo, keys: Collection[str], store: Store) -> Found:
    """Look for the samples of a shard that have one of these keys."""
    record = read_record(store, info.url)
    samples: list[Redacted] = []
    damages: list[Damage] = []
    found: set[str] = set()
    for item in read_shard(info, store):
        if isinstance(item, Damage):
            damages.append(item)
        elif item.key in keys:
            found.add(item.key)
            samples.append(Redacted(item.ordinal, item.start, item.stop, hash_key(item.key)))
    if record:
        gone = {each.key for each in (*record.samples, *(record.pending.samples if record.pending else ()))}
        found.update(key for key in keys if hash_key(key) in gone)
    pending = record is not None and record.pending is not None
    return Found(tuple(samples), frozenset(found), tuple(damages), pending)


def rewrite(info: ObjectInfo, samples: tuple[Redacted, ...], store: Store) -> Record:
    """Replace samples of a shard by tombstones, and tell its record; complete what was interrupted.

    Raises:
        ChangedError: the shard is no longer the one that was searched.
    """
    with tempfile.TemporaryDirectory(prefix="streamswav-shards-") as folder:
        aside = Path(folder, "shard.tar")
        store.download(info.url, aside)
        if store.info(info.url).version != info.version:
            raise ChangedError(redact(info.url), "was written again while it was searched; run this again")
        record = _go_on(read_record(store, info.url), info, aside)
        if samples:
            put_tombstones(aside, samples)
            begun = replace(record, pending=Pending(_digest(aside), samples))
            store.write(record_url(info.url), begun.to_json())
            store.upload(aside, info.url)
            record = _completed(begun, store.info(info.url).version)
        store.write(record_url(info.url), record.to_json())
    return record


def put_tombstones(path: Path, samples: Sequence[Redacted]) -> None:
    """Overwrite samples of a tar; members ahead of one that are no sample's go with it."""
    with path.open("r+b") as file:
        for sample in samples:
            file.seek(sample.start)
            file.write(_header(sample))
            left = sample.stop - sample.start - _BLOCK
            while left:
                left -= file.write(_ZEROS[:left])


def _header(sample: Redacted) -> bytes:
    """The header of a member that fills the sample's bytes and tells nothing but its number."""
    member = tarfile.TarInfo(f"redacted-{sample.ordinal:08d}.{TOMBSTONE}")
    member.size, member.mode = sample.stop - sample.start - _BLOCK, 0o444
    return member.tobuf(tarfile.USTAR_FORMAT)


def _go_on(record: Record | None, info: ObjectInfo, path: Path) -> Record:
    """Return the record that is true of the shard as it is now, nothing pending."""
    if record and record.pending and record.pending.digest == _digest(path):
        return _completed(record, info.version)
    if record and (record.versions[-1:], record.size) == ((info.version,), info.size):
        return replace(record, pending=None)
    return Record(info.size, (info.version,))


def _completed(record: Record, version: str) -> Record:
    versions = tuple(each for each in record.versions if each != version)
    added = record.pending.samples if record.pending else ()
    return Record(record.size, (*versions, version), (*record.samples, *added))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
