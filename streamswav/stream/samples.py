"""Reading a lane: shards become samples, in the plan's order, each with the cursor that follows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from streamswav.stream.outcomes import PassedOver
from streamswav.stream.plan import Cursor, Piece, Plan
from streamswav.stream.tar import Damage, TarSample, label_of

NAMED_SAMPLES = 64


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
        return label_of(self.members)


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
        self._damages: list[PassedOver] = []

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

    def take_damages(self) -> list[PassedOver]:
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

    def _quarantine(self, segment: int, damage: Damage) -> PassedOver:
        piece = self._pieces[segment]
        return PassedOver(piece.shard, piece.turn, damage.reason, damage.start, damage.stop)


def name_samples(pieces: Sequence[Piece], open_piece: OpenPiece) -> tuple[list[Piece], list[PassedOver]]:
    """Read what is left, so that every sample is known by its ordinal.

    Returns:
        Pieces of at most `NAMED_SAMPLES` samples that name what they hold, and the damages met.
    """
    named = [piece for piece in pieces if piece.named() is not None]
    damages: list[PassedOver] = []
    unread: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        if piece.named() is None:
            unread.setdefault((piece.shard, piece.turn), []).append(piece)
    for (shard, turn), group in unread.items():
        run: list[TarSample] = []
        for item in open_piece(min(group, key=lambda piece: piece.offset)):
            if isinstance(item, Damage):
                damages.append(PassedOver(shard, turn, item.reason, item.start, item.stop))
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
