"""Reading a lane: shards become samples, in the plan's order, each with the cursor that follows it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from streamswav.config import LoaderSection, StorageSection
from streamswav.stream.manifest import Manifest
from streamswav.stream.plan import Cursor, Piece, Plan
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage, TarSample, read_samples

NAMED_SAMPLES = 64
_SMALLEST_BLOCK = 256 << 10
_LOADER = LoaderSection()


@dataclass(frozen=True, slots=True)
class SampleId:
    """What identifies a sample: its shard (index in the manifest), the pass, and its number in the shard."""

    shard: int
    turn: int
    ordinal: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of the stream.

    Attributes:
        id: its identity.
        key: its name in the tar (path up to the first dot of the file name).
        members: bytes by extension (`jpg`, `cls`, `json`).
        image: bytes of the image, or None where the sample has none.
        start: first byte in the shard.
        stop: the byte after the last.
        lane: lane that gave it.
        cursor: where the lane is once this sample is consumed.
    """

    id: SampleId
    key: str
    members: dict[str, bytes]
    image: bytes | None
    start: int
    stop: int
    lane: int
    cursor: Cursor

    @property
    def label(self) -> int | str | None:
        """Content of the `.cls` member, a number where it is one, or None."""
        text = self.members.get("cls")
        if text is None:
            return None
        stripped = text.decode("utf-8", "replace").strip()
        try:
            return int(stripped)
        except ValueError:
            return stripped


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Bytes that are not trained, and why.

    Attributes:
        shard: index in the manifest.
        turn: the pass.
        reason: short label (`truncated`, `no_image`).
        start: first byte.
        stop: the byte after the last.
        key: the sample's key, or "" for damage.
        ordinal: the sample's number in the shard, or None for damage.
    """

    shard: int
    turn: int
    reason: str
    start: int
    stop: int
    key: str = ""
    ordinal: int | None = None


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
        requests: int = _LOADER.requests,
        memory: int = _LOADER.memory,
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


OpenPiece = Callable[[Piece], Iterator[TarSample | Damage]]


class LaneReader:
    """Iterates over the samples of one lane of a plan, from a cursor on.

    Within a window the samples come in the plan's order. A window is read as a whole before its first sample
    is given; after a restart it is read again, and what was consumed is passed over.

    Attributes:
        cursor: where the lane is after the samples given so far.
    """

    def __init__(self, plan: Plan, lane: int, open_piece: OpenPiece, cursor: Cursor | None = None) -> None:
        self._plan, self._lane, self._open = plan, lane, open_piece
        self.cursor = cursor or plan.start(lane)
        self._pieces = plan.lanes[lane]
        self._walk = self._walk_from(self.cursor)
        self._ready: deque[Sample] = deque()
        self._damages: list[Quarantined] = []

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        if not self._ready:
            self._fill()
        sample = self._ready.popleft()
        self.cursor = sample.cursor
        return sample

    @property
    def next_piece(self) -> Piece | None:
        """What a lane that was not read yet opens first; None where nothing is left."""
        return next((begun for _, _, begun in self._begin_pieces(self.cursor)), None)

    def take_damages(self) -> list[Quarantined]:
        """Return the damages met since the last call; each is met once, with the window that spans it."""
        damages, self._damages = self._damages, []
        return damages

    def _fill(self) -> None:
        """Read the current window.

        Raises:
            StopIteration: the lane is at its end.
        """
        window: list[tuple[int, TarSample]] = []
        resumed = bool(self.cursor.done)
        for segment, item in self._walk:
            if isinstance(item, TarSample):
                window.append((segment, item))
                if len(window) == self._plan.grid.window:
                    break
            elif not resumed:
                self._damages.append(self._quarantine(segment, item))
        order = self._plan.window_order(self._lane, self.cursor.window, len(window))
        self._ready.extend(self._in_order(window, order[self.cursor.emitted :]))
        if not self._ready:
            raise StopIteration

    def _in_order(self, window: list[tuple[int, TarSample]], order: list[int]) -> Iterator[Sample]:
        """Yield the window's samples with the cursor after each; after the last, the next window starts."""
        cursor = self.cursor
        for place, index in enumerate(order, 1):
            segment, item = window[index]
            if place == len(order):
                last_segment, last = window[-1]
                cursor = Cursor(last_segment, last.stop, last.ordinal + 1, self.cursor.window + 1)
            else:
                cursor = replace(cursor, done=self._mark(cursor, segment, item.ordinal))
            piece = self._pieces[segment]
            identity = SampleId(piece.shard, piece.turn, item.ordinal)
            yield Sample(
                identity, item.key, item.members, item.image, item.start, item.stop, self._lane, cursor
            )

    def _mark(self, cursor: Cursor, segment: int, ordinal: int) -> tuple[tuple[int, int], ...]:
        base = cursor.ordinal if segment == cursor.segment else self._pieces[segment].ordinal
        done = dict(cursor.done)
        done[segment] = done.get(segment, 0) | 1 << (ordinal - base)
        return tuple(sorted(done.items()))

    def _begin_pieces(self, cursor: Cursor) -> Iterator[tuple[int, Piece, Piece]]:
        """Yield number, piece, and the piece from where the lane goes on, of all that hold more."""
        for segment in range(cursor.segment, len(self._pieces)):
            piece = begun = self._pieces[segment]
            if segment == cursor.segment:
                begun = replace(piece, offset=cursor.offset, ordinal=cursor.ordinal)
            if not piece.exhausted_at(begun.ordinal):
                yield segment, piece, begun

    def _walk_from(self, cursor: Cursor) -> Iterator[tuple[int, TarSample | Damage]]:
        """Yield what the lane owns, piece by piece: samples that are wanted, damages ahead of them."""
        for segment, piece, begun in self._begin_pieces(cursor):
            ordinal = begun.ordinal
            for item in self._open(begun):
                if isinstance(item, TarSample):
                    if piece.wants(item.ordinal):
                        yield segment, item
                    ordinal = item.ordinal + 1
                    if piece.exhausted_at(ordinal):
                        break
                elif ordinal % piece.stride == piece.residue:
                    # Lanes that stride one shard all meet its damages; the next sample's lane reports them.
                    yield segment, item

    def _quarantine(self, segment: int, damage: Damage) -> Quarantined:
        piece = self._pieces[segment]
        return Quarantined(piece.shard, piece.turn, damage.reason, damage.start, damage.stop)


def name_samples(pieces: Sequence[Piece], open_piece: OpenPiece) -> tuple[list[Piece], list[Quarantined]]:
    """Read what is left, so that every sample is known by its ordinal.

    Returns:
        Pieces of at most `NAMED_SAMPLES` samples that name what they hold, and the damages met.
    """
    named = [piece for piece in pieces if piece.named() is not None]
    damages: list[Quarantined] = []
    unread: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        if piece.named() is None:
            unread.setdefault((piece.shard, piece.turn), []).append(piece)
    for (shard, turn), group in unread.items():
        run: list[TarSample] = []
        for item in open_piece(min(group, key=lambda piece: piece.offset)):
            if isinstance(item, Damage):
                damages.append(Quarantined(shard, turn, item.reason, item.start, item.stop))
            elif any(piece.ordinal <= item.ordinal and piece.wants(item.ordinal) for piece in group):
                run.append(replace(item, members={}))
            if len(run) == NAMED_SAMPLES:
                named.append(_name_run(shard, turn, run))
                run = []
        if run:
            named.append(_name_run(shard, turn, run))
    return named, damages


def _name_run(shard: int, turn: int, run: Sequence[TarSample]) -> Piece:
    first = run[0]
    bits = sum(1 << (sample.ordinal - first.ordinal) for sample in run)
    return Piece(shard, turn, first.start, first.ordinal, done=~bits)
