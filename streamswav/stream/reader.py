"""Opening shards: ranged reads in flight, within a budget of memory, and what they parse to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from streamswav.config import LoaderSection, StorageSection, StreamSection
from streamswav.stream.manifest import Manifest
from streamswav.stream.plan import Piece
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage, TarSample, read_samples

_SMALLEST_BLOCK = 256 << 10
_REQUESTS = LoaderSection().requests
_MEMORY = StreamSection().memory


class ShardReader:
    """Opens shards at an offset, with a few ranged reads in flight.

    Cheap to pickle: clients and threads are made at the first use, and stay in their process.

    Args:
        manifest: the shards.
        storage: how they are reached; its `block_bytes` is the largest read.
        read_ahead: blocks that a shard is ahead of its reader, also while nobody reads on.
        requests: reads in flight, over all open shards.
        memory: bytes of blocks over all open shards; where there are many of these, blocks shrink to it.

    Attributes:
        fetch_seconds: time that the reading thread waited for bytes.
    """

    def __init__(
        self,
        manifest: Manifest,
        storage: StorageSection,
        *,
        read_ahead: int,
        requests: int = _REQUESTS,
        memory: int = _MEMORY,
    ) -> None:
        self._manifest, self._storage = manifest, storage
        self._read_ahead, self._requests, self._memory = read_ahead, requests, memory
        self._store: Store | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._traffic: deque[tuple[str, int]] = deque()
        self._block = storage.block_bytes
        self._begun: dict[tuple[int, int], list[_Blocks]] = {}
        self.fetch_seconds = 0.0

    def __reduce__(self) -> tuple[Callable[..., ShardReader], tuple[object, ...]]:
        limits = {"read_ahead": self._read_ahead, "requests": self._requests, "memory": self._memory}
        return _make_reader, (self._manifest, self._storage, limits)

    def digest(self, shard: int) -> int:
        """Return the shard's identity, 64 bits."""
        return self._manifest.shards[shard].digest

    def take_traffic(self) -> list[tuple[str, int]]:
        """Return (outcome, bytes received) of every request since the last call."""
        return [self._traffic.popleft() for _ in range(len(self._traffic))]

    def share_among(self, lanes: int) -> int:
        """Choose the size of blocks, in bytes, for so many lanes that stay open; forget what was begun.

        A lane holds the blocks ahead, the one it parses, and the copy that joins it to the next.
        """
        fitting = self._memory // ((self._read_ahead + 2) * lanes)
        self._block = min(self._storage.block_bytes, max(fitting, _SMALLEST_BLOCK))
        self._begun.clear()
        return self._block

    def begin(self, piece: Piece) -> None:
        """Ask for the first blocks of a piece that will be opened soon, without waiting for them."""
        blocks = self._blocks(piece)
        blocks.ask()
        self._begun.setdefault((piece.shard, piece.offset), []).append(blocks)

    def open(self, piece: Piece) -> Iterator[TarSample | Damage]:
        """Yield samples and damages of the piece's shard, from the piece's offset on.

        Raises:
            StorageError: the shard is missing, changed, or out of reach until the deadline.
        """
        begun = self._begun.get((piece.shard, piece.offset))
        blocks = begun.pop() if begun else self._blocks(piece)
        size = self._manifest.shards[piece.shard].size
        return read_samples(self._timed(blocks), size=size, start=piece.offset, ordinal=piece.ordinal)

    def _blocks(self, piece: Piece) -> _Blocks:
        if self._pool is None or self._store is None:
            self._pool = ThreadPoolExecutor(self._requests, thread_name_prefix="read-ahead")
            self._store = Store(self._storage, on_request=self._record)
        shard, pool, read = self._manifest.shards[piece.shard], self._pool, self._store.read_range

        def fetch(start: int) -> Future[bytes]:
            stop = min(start + size, shard.size)
            return pool.submit(read, shard.url, start, stop, version=shard.version)

        size = self._block
        return _Blocks(fetch, range(piece.offset, shard.size, size), ahead=self._read_ahead)

    def _timed(self, blocks: _Blocks) -> Iterator[bytes]:
        while True:
            began = time.perf_counter()
            block = next(blocks, None)
            self.fetch_seconds += time.perf_counter() - began
            if block is None:
                return
            yield block

    def _record(self, outcome: str, _: float, received: int) -> None:
        self._traffic.append((outcome, received))


class _Blocks:
    """The blocks at these offsets, in order, of which some are asked for ahead."""

    def __init__(self, fetch: Callable[[int], Future[bytes]], offsets: range, *, ahead: int) -> None:
        self._fetch, self._offsets, self._ahead = fetch, iter(offsets), ahead
        self._waiting: deque[Future[bytes]] = deque()

    def ask(self) -> None:
        """Have as many blocks on their way as may be ahead."""
        while len(self._waiting) < self._ahead and (offset := next(self._offsets, None)) is not None:
            self._waiting.append(self._fetch(offset))

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.ask()
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()


def _make_reader(manifest: Manifest, storage: StorageSection, limits: dict[str, int]) -> ShardReader:
    return ShardReader(manifest, storage, **limits)
