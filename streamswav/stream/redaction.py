"""What a shard says of samples that were taken out of it: tombstones, and the record beside it.

A redacted sample leaves a *tombstone*: one tar member of zeros of the same length, so that the offsets and
ordinals of all others stay. The record `SHARD.redacted.json` holds the chain of the shard's versions: a run
that has pinned one of them may go on with the last. It is written as pending before the shard is, and again
after it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamswav.errors import DeniedError, NotFoundError, UnsupportedError
from streamswav.stream.store import Store

TOMBSTONE = "tombstone"

_SUFFIX = ".redacted.json"
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Redacted:
    """A sample that was taken out: its number in the shard, its bytes [start, stop), the hash of its key."""

    ordinal: int
    start: int
    stop: int
    key: str


@dataclass(frozen=True, slots=True)
class Pending:
    """A redaction under way: samples to go, and the SHA-256 of the shard without them."""

    digest: str
    samples: tuple[Redacted, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a shard.

    Attributes:
        size: of the shard in bytes; it never changes.
        versions: of the shard, oldest first: each but the first is its predecessor with samples taken out.
        samples: taken out by now.
        pending: what is being done, if anything.
    """

    size: int
    versions: tuple[str, ...]
    samples: tuple[Redacted, ...] = ()
    pending: Pending | None = None

    def to_json(self) -> bytes:
        """Return what `read_record` reads."""
        pending = self.pending and {"digest": self.pending.digest, "samples": _rows(self.pending.samples)}
        values = {
            "size": self.size,
            "versions": self.versions,
            "samples": _rows(self.samples),
            "pending": pending,
        }
        return (json.dumps(values, indent=1) + "\n").encode()


def is_tombstone(members: Mapping[str, bytes]) -> bool:
    """Tell whether these are the members of what is left of a redacted sample."""
    return len(members) == 1 and TOMBSTONE in members


def hash_key(key: str) -> str:
    """Return what a record holds in place of a sample's key."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def record_url(url: str) -> str:
    """Return where a shard's record lies."""
    if url.startswith(("http://", "https://")):
        path, mark, query = url.partition("?")
        return path + _SUFFIX + mark + query
    return url + _SUFFIX


def read_record(store: Store, url: str) -> Record | None:
    """Read the record of a shard; None where there is none that can be understood."""
    try:
        values = json.loads(store.read(record_url(url)))
        pending = values["pending"]
        return Record(
            int(values["size"]),
            tuple(map(str, values["versions"])),
            _samples(values["samples"]),
            Pending(str(pending["digest"]), _samples(pending["samples"])) if pending else None,
        )
    # Who may not list a bucket is denied what is not there.
    except (NotFoundError, DeniedError, UnsupportedError):
        return None
    except (ValueError, KeyError, TypeError):
        return None


def newest_version(
    store: Store, url: str, frozen_version: str, *, patience_seconds: float = _PATIENCE_SECONDS
) -> str | None:
    """Find the version with which a reader goes on that has pinned another one.

    Args:
        store: how the shard is reached.
        url: the shard.
        frozen_version: what the reader has pinned.
        patience_seconds: how long a redaction under way is waited for.

    Returns:
        The object's version, if it is the pinned one with samples taken out, or still that one; None if it
        was replaced in any other way.

    Raises:
        NotFoundError: the shard is gone.
        StorageError: it is out of reach.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        record = read_record(store, url)
        if record is None or frozen_version not in record.versions:
            return None
        now = store.info(url)
        if now.size == record.size and now.version in _since(record, frozen_version):
            return now.version
        if record.pending is None or time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_SECONDS)


def find_redacted(store: Store, url: str, key: str) -> list[tuple[int, int, int]]:
    """Return (ordinal, start, stop) of the samples with this key that were taken out of a shard."""
    record, wanted = read_record(store, url), hash_key(key)
    samples = record.samples if record else ()
    return [(each.ordinal, each.start, each.stop) for each in samples if each.key == wanted]


def _since(record: Record, version: str) -> tuple[str, ...]:
    return record.versions[record.versions.index(version) :]


def _rows(samples: tuple[Redacted, ...]) -> list[dict[str, Any]]:
    return [
        {"ordinal": each.ordinal, "start": each.start, "stop": each.stop, "key": each.key} for each in samples
    ]


def _samples(rows: list[dict[str, Any]]) -> tuple[Redacted, ...]:
    return tuple(
        Redacted(int(row["ordinal"]), int(row["start"]), int(row["stop"]), str(row["key"])) for row in rows
    )
