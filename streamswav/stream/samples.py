"""Reading a lane: shards become samples, in the plan's order, each with the cursor that follows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from streamswav.stream.memory import Answer, Shelf
from streamswav.stream.outcomes import LOST_REASONS, PassedOver
from streamswav.stream.pieces import Cursor, Piece, by_part, holds
from streamswav.stream.plan import Plan
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
Judge = Callable[[int, TarSample], tuple[str, str] | None]


class LaneReader:
    """Iterates over the samples of one lane of a plan, from a cursor on.

    Within a window the samples come in the plan's order. A window is read as a whole before its first sample
    is given; what the shelf has no room for is kept by its place and read again when it is given. After a
    restart a window is read again, and what was consumed is passed over.

    Args:
        plan: what is read.
        lane: which of its lanes.
        open_piece: gives samples and damages of a piece's shard.
        cursor: where to go on; by default at the lane's beginning.
        shelf: where the window lies; by default there is room for all of it.

    Attributes:
        cursor: where the lane is after the samples given so far.
    """

    def __init__(
        self,
        plan: Plan,
        lane: int,
        open_piece: OpenPiece,
        cursor: Cursor | None = None,
        *,
        shelf: Shelf | None = None,
    ) -> None:
        self._plan, self._lane, self._shelf = plan, lane, shelf
        self.cursor = self._end = cursor or plan.start(lane)
        self._pieces = plan.lanes[lane]
        if shelf is not None:
            for _, _, begun in self._begin_pieces(self.cursor):
                shelf.shared.expect(begun)
            open_piece = partial(shelf.shared.open, open_piece=open_piece)
        self._walk = _Walk(self._begin_pieces(self.cursor), open_piece)
        self._window: dict[int, tuple[int, TarSample]] = {}
        self._order: deque[int] = deque()
        self._asked: dict[int, Answer] = {}
        self._given = 0
        self._damages: list[PassedOver] = []

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        while True:
            while not self._order:
                self._fill()
            if (sample := self._give()) is not None:
                return sample

    @property
    def next_piece(self) -> Piece | None:
        """What a lane that was not read yet opens first; None where nothing is left."""
        return next((begun for _, _, begun in self._begin_pieces(self.cursor)), None)

    def take_damages(self) -> list[PassedOver]:
        """Return what was passed over since the last call: damages, and samples that cannot be had.

        A damage is met with the window that spans it, and again where that is read again after a restart; a
        sample is met once, in its turn.
        """
        damages, self._damages = self._damages, []
        return damages

    def ask(self, count: int) -> None:
        """Begin to read again what of the next `count` samples is not held, as far as there is room."""
        for place in range(min(count, len(self._order))):
            index = self._order[place]
            segment, kept = self._window[index]
            if kept.members or kept.reason or index in self._asked:
                continue
            if self._shelf is None or not self._shelf.has_room(kept):
                return
            self._asked[index] = self._shelf.ask(self._pieces[segment].shard, kept)

    def _fill(self) -> None:
        """Read the next window.

        Raises:
            StopIteration: the lane is at its end.
        """
        self.cursor = self._end
        done = set[int]()
        for segment, item in self._walk:
            if isinstance(item, TarSample):
                index = len(self._window)
                consumed = self._is_consumed(segment, item.ordinal)
                if consumed:
                    done.add(index)
                self._window[index] = (segment, self._keep(item, consumed))
                if len(self._window) == self._plan.grid.window:
                    break
            else:  # a window that is read again may reach further than before; who counts knows repeats
                self._damages.append(self._quarantine(segment, item))
        if not self._window:
            raise StopIteration
        last_segment, last = self._window[len(self._window) - 1]
        self._end = Cursor(last_segment, last.stop, last.ordinal + 1, self.cursor.window + 1)
        order = self._plan.window_order(self._lane, self.cursor.window, len(self._window))
        self._order.extend(index for index in order if index not in done)
        for index in done:
            del self._window[index]

    def _give(self) -> Sample | None:
        """Take the next sample of the window; None where its bytes are not to be had."""
        self.ask(self._plan.grid.share - self._given % self._plan.grid.share)
        index = self._order.popleft()
        segment, kept = self._window.pop(index)
        piece = self._pieces[segment]
        identity = SampleId(piece.shard, piece.turn, kept.ordinal)
        item = self._take_whole(index, piece.shard, kept)
        if self._order:
            self.cursor = replace(self.cursor, done=self._mark(segment, kept.ordinal))
        else:
            self.cursor = self._end
        if isinstance(item, Damage) or item.reason:
            self._damages.append(pass_over(identity, kept, "quarantined", item.reason))
            return None
        self._given += 1
        return Sample(
            identity, item.key, item.members, item.image, item.start, item.stop, self._lane, self.cursor
        )

    def _keep(self, sample: TarSample, consumed: bool) -> TarSample:
        if consumed:
            return replace(sample, members={})
        return self._shelf.keep(sample) if self._shelf else sample

    def _take_whole(self, index: int, shard: int, kept: TarSample) -> TarSample | Damage:
        if self._shelf is None or kept.reason:
            return kept
        if kept.members:
            self._shelf.release(kept)
            return kept
        answer = self._asked.pop(index, None) or self._shelf.ask(shard, kept)
        return answer()

    def _is_consumed(self, segment: int, ordinal: int) -> bool:
        bits = dict(self.cursor.done).get(segment, 0)
        return bool(bits >> (ordinal - self._base(segment)) & 1)

    def _mark(self, segment: int, ordinal: int) -> tuple[tuple[int, int], ...]:
        done = dict(self.cursor.done)
        done[segment] = done.get(segment, 0) | 1 << (ordinal - self._base(segment))
        return tuple(sorted(done.items()))

    def _base(self, segment: int) -> int:
        """The ordinal that bit 0 of a cursor's bitmap stands for."""
        return self.cursor.ordinal if segment == self.cursor.segment else self._pieces[segment].ordinal

    def _begin_pieces(self, cursor: Cursor) -> Iterator[tuple[int, Piece, Piece]]:
        """Yield number, piece, and the piece from where the lane goes on, of all that hold more."""
        for segment in range(cursor.segment, len(self._pieces)):
            piece = begun = self._pieces[segment]
            if segment == cursor.segment:
                begun = replace(piece, offset=cursor.offset, ordinal=cursor.ordinal)
            if not piece.exhausted_at(begun.ordinal):
                yield segment, piece, begun

    def _quarantine(self, segment: int, damage: Damage) -> PassedOver:
        piece = self._pieces[segment]
        return PassedOver(piece.shard, piece.turn, damage.reason, damage.start, damage.stop)


class _Walk:
    """What a lane owns, piece by piece: samples that are wanted, damages ahead of them.

    It holds none of them once it is given; a generator would hold the last.
    """

    def __init__(self, pieces: Iterator[tuple[int, Piece, Piece]], open_piece: OpenPiece) -> None:
        self._pieces, self._open = pieces, open_piece
        self._items: Iterator[TarSample | Damage] = iter(())
        self._segment = self._ordinal = 0
        self._piece: Piece

    def __iter__(self) -> Iterator[tuple[int, TarSample | Damage]]:
        return self

    def __next__(self) -> tuple[int, TarSample | Damage]:
        while True:
            item = next(self._items, None)
            if item is None:
                self._segment, self._piece, begun = next(self._pieces)
                self._ordinal, self._items = begun.ordinal, self._open(begun)
            elif self._owns(item):
                return self._segment, item

    def _owns(self, item: TarSample | Damage) -> bool:
        piece = self._piece
        if isinstance(item, TarSample):
            self._ordinal = item.ordinal + 1
            if piece.exhausted_at(self._ordinal):
                self._items = iter(())
            return piece.wants(item.ordinal)
        # Lanes that stride one shard all meet its damages; the next sample's lane reports them.
        return item.reason in LOST_REASONS or self._ordinal % piece.stride == piece.residue


def name_samples(
    pieces: Sequence[Piece], open_piece: OpenPiece, judge: Judge = lambda *_: None
) -> tuple[list[Piece], list[PassedOver]]:
    """Read what is left, so that every sample is known by its ordinal.

    Args:
        pieces: what is left.
        open_piece: opens a shard.
        judge: given a shard's index and a sample, the outcome and the reason of one that is not trained.

    Returns:
        Pieces of at most `NAMED_SAMPLES` samples that name what they hold, and what is passed over: damages,
        and samples that are not trained.
    """
    named = [piece for piece in pieces if piece.named() is not None]
    passed: list[PassedOver] = []
    unread = by_part(piece for piece in pieces if piece.named() is None)
    for (shard, turn), group in unread.items():
        run: list[TarSample] = []
        for item in open_piece(min(group, key=lambda piece: piece.offset)):
            if isinstance(item, Damage):
                passed.append(PassedOver(shard, turn, item.reason, item.start, item.stop))
            elif holds(group, item.ordinal):
                verdict = ("quarantined", item.reason) if item.reason else judge(shard, item)
                if verdict is None:
                    run.append(replace(item, members={}))
                else:
                    passed.append(pass_over(SampleId(shard, turn, item.ordinal), item, *verdict))
            if len(run) == NAMED_SAMPLES:
                named.append(_name_run(shard, turn, run))
                run = []
        if run:
            named.append(_name_run(shard, turn, run))
    return named, passed


def pass_over(identity: SampleId, sample: Sample | TarSample, outcome: str, reason: str) -> PassedOver:
    """Return the record of a sample that is not trained."""
    return PassedOver(
        identity.shard,
        identity.turn,
        reason,
        sample.start,
        sample.stop,
        sample.key,
        identity.ordinal,
        outcome,
    )


def _name_run(shard: int, turn: int, run: Sequence[TarSample]) -> Piece:
    first = run[0]
    bits = sum(1 << (sample.ordinal - first.ordinal) for sample in run)
    return Piece(shard, turn, first.start, first.ordinal, done=~bits)
