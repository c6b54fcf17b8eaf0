"""Ranged reads through the node's cache: what it has is not fetched again while the object is the same."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from streamswav.errors import ChangedError, NotFoundError
from streamswav.stream.cache import BlockCache, Blocks
from streamswav.stream.manifest import Shard
from streamswav.stream.store import Store, redact

CACHE_HIT, CACHE_MISS = "cache_hit", "cache_miss"
CACHE_OUTCOMES = (CACHE_HIT, CACHE_MISS)
TRUST_SECONDS = 60.0


class CachedReads:
    """Reads shards, the cache first where there is one. Threads may share it.

    What is cached is given only while the object is still of its version: that is asked of the store (a
    request without a body) at the first hit of a shard, and again after a minute. So a shard that was
    replaced or redacted is met as it is without a cache.

    Args:
        store: where shards lie.
        cache: of this node; None: there is none.
        on_read: called with `cache_hit` or `cache_miss` for each read that the cache could have answered.
    """

    def __init__(self, store: Store, cache: BlockCache | None, on_read: Callable[[str], None]) -> None:
        self._store, self._cache, self._on_read = store, cache, on_read
        self._seen: dict[Blocks, float] = {}
        self._locks: dict[Blocks, threading.Lock] = {}

    def read(self, shard: Shard, start: int, stop: int, *, version: str, block: int) -> bytes:
        """Return the bytes [start, stop) of a shard; whole blocks are kept.

        Raises:
            ChangedError: it is no longer of this version.
            StorageError: as the store.
        """
        cache = self._cache
        blocks = cache.of(shard.url, version, size=shard.size, block=block) if cache else None
        if cache is None or blocks is None or stop <= start:
            return self._store.read_range(shard.url, start, stop, version=version)
        try:
            return self._read(blocks, shard, range(start, stop), version)
        except (ChangedError, NotFoundError):
            # What was taken out of a shard must not stay behind here.
            cache.forget(blocks)
            raise

    def _read(self, blocks: Blocks, shard: Shard, span: range, version: str) -> bytes:
        cache = self._cache
        assert cache is not None
        data = cache.read(blocks, span.start, span.stop)
        if data is not None:
            self._check(cache, blocks, shard, version)
            self._on_read(CACHE_HIT)
            return data
        data = self._store.read_range(shard.url, span.start, span.stop, version=version)
        self._saw(cache, blocks)
        self._on_read(CACHE_MISS)
        cache.write(blocks, span.start, data)
        return data

    def _check(self, cache: BlockCache, blocks: Blocks, shard: Shard, version: str) -> None:
        with self._locks.setdefault(blocks, threading.Lock()):
            if time.monotonic() - self._seen.get(blocks, -math.inf) < TRUST_SECONDS:
                return
            info = self._store.info(shard.url)
            if (info.version, info.size) != (version, shard.size):
                raise ChangedError(redact(shard.url), "the object was replaced since it was listed")
            self._saw(cache, blocks)

    def _saw(self, cache: BlockCache, blocks: Blocks) -> None:
        """Note that the object has this version now; then no other one is worth its room."""
        if blocks not in self._seen:
            cache.forget(blocks, others=True)
        self._seen[blocks] = time.monotonic()
