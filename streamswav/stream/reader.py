"""Opening shards: ranged reads in flight, within a budget of memory, and what they parse to."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from streamswav.config import LoaderSection, StorageSection, StreamSection
from streamswav.errors import ChangedError, NotFoundError, StorageError
from streamswav.stream.cache import check_cache, open_cache
from streamswav.stream.cached import CACHE_OUTCOMES, CachedReads
from streamswav.stream.manifest import Manifest
from streamswav.stream.memory import Answer, Shelf, share_memory
from streamswav.stream.pieces import Piece
from streamswav.stream.redaction import newest_version
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage, TarSample, read_samples
from streamswav.telemetry.metrics import Metrics, Role

_REQUESTS = LoaderSection().requests
_MEMORY = StreamSection().memory
_WINDOW = StreamSection().window

Fetched = TypeVar("Fetched")
Items = Iterator[TarSample | Damage]
Parse = Callable[[int, int, int], "tuple[_Blocks, Items]"]
Lost = Callable[[int, str, NotFoundError | ChangedError], str | None]
OnOpened = Callable[[str], None]


class ShardReader:
    """Opens shards at an offset, with a few ranged reads in flight.

    A shard that is gone, or was replaced by another, ends where it is met: its rest is a damage with one of
    `LOST_REASONS`. One of which samples were redacted is read on.

    Cheap to pickle: clients and threads are made at the first use, and stay in their process.

    Args:
        manifest: the shards.
        storage: how they are reached; its `block_bytes` is the largest read.
        read_ahead: most blocks that a shard is ahead of its parser, also while nobody reads on.
        requests: reads in flight, over all open shards.
        memory: bytes of blocks and windows of one process; where lanes are many, both shrink to it.
        lanes: that will stay open in a process.
        window: samples of a window.
        metrics: count requests, bytes and opened shards; in another process it is that one's own which do.
        crossed: it comes from another process, which has looked whether the cache can be used.

    Attributes:
        manifest: the shards; it may grow.
        shelf: where the windows of this process put their samples.
        metrics: what it counts in.
        fetch_seconds: time that the reading thread waited for bytes.

    Raises:
        ConfigError: the memory does not do for these lanes (it says how much would); or nothing can be kept
            in `storage.cache`.
    """

    def __init__(
        self,
        manifest: Manifest,
        storage: StorageSection,
        *,
        read_ahead: int,
        requests: int = _REQUESTS,
        memory: int = _MEMORY,
        lanes: int = 1,
        window: int = _WINDOW,
        metrics: Metrics | None = None,
        crossed: bool = False,
    ) -> None:
        self.manifest, self._storage = manifest, storage
        self._read_ahead, self._requests, self._memory = read_ahead, requests, memory
        self.metrics = metrics or Metrics(Role.NONE)
        self._source: _Source | None = None
        self._begun: dict[tuple[int, int], list[_Blocks]] = {}
        self._traffic: deque[tuple[str, int]] = deque()
        self.fetch_seconds = 0.0
        if not crossed:
            check_cache(storage)
        self.share_among(lanes, window)

    def __reduce__(self) -> tuple[Callable[..., ShardReader], tuple[object, ...]]:
        limits = {"read_ahead": self._read_ahead, "requests": self._requests, "memory": self._memory}
        limits |= {"lanes": self._lanes, "window": self._window}
        return _make_reader, (self.manifest, self._storage, limits, self.metrics)

    @property
    def block(self) -> int:
        """Bytes of one ranged read."""
        return self._shares.block

    def digest(self, shard: int) -> int:
        """Return the shard's identity, 64 bits."""
        return self.manifest.shards[shard].digest

    def take_traffic(self) -> list[tuple[str, int]]:
        """Return (outcome, bytes received) of every request since the last call.

        With a cache there are reads of it among them, as `cache_hit` and `cache_miss`, without bytes.
        """
        return [self._traffic.popleft() for _ in range(len(self._traffic))]

    def share_among(self, lanes: int, window: int = _WINDOW) -> int:
        """Share the memory among so many lanes that stay open; forget what was begun and what is held.

        Returns:
            The size of blocks, in bytes.

        Raises:
            ConfigError: the memory does not do for so many lanes and windows of so many samples.
        """
        self._lanes, self._window = lanes, window
        self._shares = share_memory(
            self._memory,
            lanes=lanes,
            window=window,
            block=self._storage.block_bytes,
            read_ahead=self._read_ahead,
            requests=self._requests,
        )
        if self._storage.cache:  # the same blocks for lanes of about the same number
            self._shares = replace(self._shares, block=1 << (self._shares.block.bit_length() - 1))
        self.shelf = Shelf(self._shares.held, self._shares.ahead, self._read_again)
        self._begun.clear()
        return self._shares.block

    def begin(self, piece: Piece) -> None:
        """Ask for the first blocks of a piece that will be opened soon, without waiting for them.

        Of several pieces that stride one shard only the first is begun: the others will follow it.
        """
        if piece.stride > 1 and any(shard == piece.shard for shard, _ in self._begun):
            return
        blocks = self._blocks(piece.shard, piece.offset)
        blocks.begin()
        self._begun.setdefault((piece.shard, piece.offset), []).append(blocks)

    def open(self, piece: Piece) -> Iterator[TarSample | Damage]:
        """Return samples and damages of the piece's shard, from the piece's offset on.

        Raises:
            StorageError: while it is iterated over: the shard is out of reach until the deadline.
        """
        size = self.manifest.shards[piece.shard].size
        return _Parsed(self._parse, self._connect().lost, piece, size, self._opened)

    def _parse(self, shard: int, start: int, ordinal: int) -> tuple[_Blocks, Items]:
        """Begin to read a shard from a sample's start on."""
        begun = self._begun.get((shard, start))
        blocks = begun.pop() if begun else self._blocks(shard, start)
        size, limit = self.manifest.shards[shard].size, self._shares.largest
        timed = iter(lambda: self._timed(blocks.take), b"")
        return blocks, read_samples(timed, size=size, start=start, ordinal=ordinal, limit=limit)

    def _blocks(self, shard: int, start: int) -> _Blocks:
        source, length, size = self._connect(), self._shares.block, self.manifest.shards[shard].size
        version, aligned = source.version(shard), start // length * length

        def fetch(at: int) -> Future[bytes]:
            stop = min(at + length, size)
            return source.pool.submit(source.read, shard, max(at, start), stop, version)

        # Cut at the same places wherever it begins: else what is cached would not fit the next time.
        return _Blocks(fetch, range(aligned, size, length), ahead=self._shares.read_ahead, version=version)

    def _read_again(self, shard: int, sample: TarSample) -> Answer:
        source = self._connect()
        future = source.pool.submit(source.read_sample, shard, sample)
        return lambda: self._timed(future.result)

    def _connect(self) -> _Source:
        if self._source is None:
            store = Store(self._storage, on_request=self._record)
            reads = CachedReads(store, open_cache(self._storage), self._record)
            self._source = _Source(self, store, reads, self._requests)
        return self._source

    def _timed(self, wait: Callable[[], Fetched]) -> Fetched:
        began = time.perf_counter()
        try:
            return wait()
        finally:
            self.fetch_seconds += time.perf_counter() - began

    def _record(self, outcome: str, seconds: float = 0.0, received: int = 0) -> None:
        self._traffic.append((outcome, received))
        if outcome in CACHE_OUTCOMES:
            self.metrics.add("cache_reads_total", 1, outcome.removeprefix("cache_"))
        else:
            self.metrics.count_request(outcome, seconds, received)

    def _opened(self, outcome: str) -> None:
        self.metrics.add("shard_opens_total", 1, outcome)


class _Source:
    """This process' client, its threads, and the newer versions of shards that were redacted."""

    def __init__(self, reader: ShardReader, store: Store, reads: CachedReads, requests: int) -> None:
        self.pool = ThreadPoolExecutor(requests, thread_name_prefix="read-ahead")
        self._reader, self._store, self._reads = reader, store, reads
        self._versions: dict[int, str] = {}
        self._lock = threading.Lock()

    def version(self, shard: int) -> str:
        """Return the version that is read."""
        return self._versions.get(shard) or self._reader.manifest.shards[shard].version

    def read(self, shard: int, start: int, stop: int, version: str) -> bytes:
        """Return the bytes [start, stop) of this version."""
        listed = self._reader.manifest.shards[shard]
        return self._reads.read(listed, start, stop, version=version, block=self._reader.block)

    def read_sample(self, shard: int, sample: TarSample) -> TarSample | Damage:
        """Read a sample that is known by its place, or tell why it cannot be read any more."""
        while True:
            version = self.version(shard)
            try:
                data = self.read(shard, sample.start, sample.stop, version)
            except (NotFoundError, ChangedError) as error:
                if reason := self.lost(shard, version, error):
                    return Damage(reason, sample.start, sample.stop)
                continue
            item = next(read_samples([data], start=sample.start, ordinal=sample.ordinal), None)
            if isinstance(item, TarSample):
                return replace(sample, key=item.key, members=item.members)
            return Damage("changed_shard", sample.start, sample.stop)

    def lost(self, shard: int, version: str, error: NotFoundError | ChangedError) -> str | None:
        """Return why a shard can no longer be read; None if it can, in a newer version."""
        if isinstance(error, NotFoundError):
            return "missing_shard"
        listed = self._reader.manifest.shards[shard]
        with self._lock:
            if self.version(shard) != version:
                return None
            try:
                newest = newest_version(self._store, listed.url, listed.version)
            except NotFoundError:
                return "missing_shard"
            if newest is None or newest == version:
                return "changed_shard"
            self._versions[shard] = newest
            return None


class _Parsed:
    """Samples and damages of a piece's shard. It holds none of them once it is given."""

    def __init__(self, parse: Parse, lost: Lost, piece: Piece, size: int, on_opened: OnOpened) -> None:
        self._parse, self._lost, self._on_opened, self._open = parse, lost, on_opened, False
        self._shard, self._at, self._ordinal, self._size = piece.shard, piece.offset, piece.ordinal, size
        self._items: Items
        self._blocks, self._items = parse(piece.shard, piece.offset, piece.ordinal)

    def __iter__(self) -> Iterator[TarSample | Damage]:
        return self

    def __next__(self) -> TarSample | Damage:
        while True:
            try:
                item = next(self._items)
            except (NotFoundError, ChangedError) as error:
                if reason := self._lost(self._shard, self._blocks.version, error):
                    self._items, self._open = iter(()), True
                    self._on_opened(reason.removesuffix("_shard"))
                    return Damage(reason, self._at, self._size)
                self._blocks, self._items = self._parse(self._shard, self._at, self._ordinal)
            except StorageError:
                self._on_opened("error")
                raise
            else:
                if not self._open:
                    self._open = True
                    self._on_opened("ok")
                self._at = item.stop
                self._ordinal += isinstance(item, TarSample)
                return item


class _Blocks:
    """The blocks at these offsets, in order, of which some are asked for ahead."""

    def __init__(
        self, fetch: Callable[[int], Future[bytes]], offsets: range, *, ahead: int, version: str
    ) -> None:
        self._fetch, self._offsets, self._ahead = fetch, iter(offsets), ahead
        self._waiting: deque[Future[bytes]] = deque()
        self.version = version

    def begin(self) -> None:
        """Have the first blocks on their way."""
        self._ask(max(1, self._ahead))

    def take(self) -> bytes:
        """Wait for the next block, while those ahead are on their way; no bytes at the end."""
        self._ask(self._ahead + 1)
        return self._waiting.popleft().result() if self._waiting else b""

    def _ask(self, count: int) -> None:
        while len(self._waiting) < count and (offset := next(self._offsets, None)) is not None:
            self._waiting.append(self._fetch(offset))


def _make_reader(
    manifest: Manifest, storage: StorageSection, limits: dict[str, int], metrics: Metrics
) -> ShardReader:
    return ShardReader(manifest, storage, **limits, metrics=metrics, crossed=True)
