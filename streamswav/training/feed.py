"""Batches for the trainer, across generations and passes, agreed among the ranks one step ahead.

No rank enters a step that another will not reach: before a batch is handed out, all ranks have said over
gloo on the CPU that they hold it, and whether anybody wants to drain, save or give up.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from streamswav.crops import MultiCrop
from streamswav.errors import EXIT_FAILED, ManifestError, PeerError
from streamswav.loader import Batch, Exhausted, Item, LaneBatches, Unlabelled, read_label
from streamswav.processes import Failed, open_loader, run_errand
from streamswav.stream.grid import check_grid
from streamswav.stream.labels import Labels
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import LOST_REASONS, OUTCOMES, PassedOver, Tally
from streamswav.stream.pieces import Cursor, Piece
from streamswav.stream.plan import Deal, Plan, bytes_left, gather_pieces, remaining, without
from streamswav.stream.position import Position, tally_passed
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import name_samples
from streamswav.stream.select import Selection
from streamswav.stream.tar import TarSample
from streamswav.training.budgets import Budgets
from streamswav.training.distributed import Ranks
from streamswav.training.growth import Growth
from streamswav.training.outlook import LaneBytes, Outlook, look_ahead

_LOOK_UP_SECONDS = 0.5

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class FeedSettings:
    """What the feed needs of the configuration.

    Attributes:
        workers: loader processes a rank.
        prefetch: batches ahead, a worker.
        budgets: of what may be passed over.
    """

    workers: int
    prefetch: int
    budgets: Budgets


@dataclass(frozen=True)
class Hooks:
    """What the feed asks of those around it, and tells them.

    Attributes:
        drain: whether this rank was asked to stop.
        wants_save: whether rank 0 wishes a checkpoint after the next step.
        wants_log: whether rank 0 wishes a log line after the next step.
        on_passed_over: called on every rank for each stretch that is quarantined, as it is agreed.
        on_idle: called on every rank with True when a followed stream has nothing left, and with False once
            there is something again.
        on_grown: called on every rank with the manifest to which new shards came.
    """

    drain: Callable[[], bool] = lambda: False
    wants_save: Callable[[], bool] = lambda: False
    wants_log: Callable[[], bool] = lambda: False
    on_passed_over: Callable[[PassedOver], None] = lambda _: None
    on_idle: Callable[[bool], None] = lambda _: None
    on_grown: Callable[[Manifest], None] = lambda _: None


class Feed:
    """Iterates over this rank's batches and keeps the position that the trainer commits.

    Attributes:
        manifest: the shards; it grows where the stream is followed.
        position: the position of all ranks: what is quarantined as of now, all else as of the last
            `synchronise`.
        drained: a rank was asked to stop; the iteration has ended early, on all ranks alike.
        save_agreed: rank 0 wishes a checkpoint after this step.
        log_agreed: rank 0 wishes a log line after this step.
        unwritten: what was passed over since the list was emptied last; complete on rank 0, after
            `synchronise`.
    """

    def __init__(
        self,
        manifest: Manifest,
        position: Position,
        *,
        settings: FeedSettings,
        reader: ShardReader,
        crop: MultiCrop,
        labels: Labels | None = None,
        ranks: Ranks,
        select: Selection | None = None,
        growth: Growth | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        check_grid(position.grid, world_size=ranks.world_size, workers=settings.workers)
        self.manifest, self.position = manifest, position
        self._settings, self._reader, self._crop, self._ranks = settings, reader, crop, ranks
        self._labels = labels
        self._select, self._growth = select or Selection.none(), growth
        self._hooks = hooks or Hooks()
        self._measure()
        self._cursors: dict[int, Cursor] = {}
        self._tallies: defaultdict[int, Tally] = defaultdict(Tally)
        self._passed: list[PassedOver] = []
        self._sample_bytes = 0
        self._batches = 0
        self._on_probation = True
        self._lane_bytes: LaneBytes | None = None
        self.drained = False
        self.save_agreed = self.log_agreed = False
        self.unwritten: list[PassedOver] = []

    @property
    def seen(self) -> int:
        """Samples that steps were given by all ranks, this moment."""
        return self.position.seen.samples + self._batches * self.position.grid.batch

    @property
    def seen_bytes(self) -> int:
        """Their bytes in the shards."""
        return self.position.seen.bytes + self._sample_bytes

    @property
    def skipped(self) -> int:
        """Samples and stretches quarantined by all ranks, this moment."""
        return self.position.total("quarantined").samples + len(self.position.damages)

    def look_ahead(self) -> Outlook:
        """Return what is ahead of the position, as of the last `synchronise`."""
        return look_ahead(self.position, self.manifest, run_bytes=self._run_bytes, lanes=self._lane_bytes)

    def __iter__(self) -> Iterator[Batch]:
        while not (self.position.finished or self.drained):
            plan = self.position.plan(self.manifest)
            gone = yield from self._generation(plan)
            if not self.drained:
                self._deal_again(plan, gone)

    def commit(self, batch: Batch) -> None:
        """Advance the position past a batch whose optimizer step is done."""
        self._cursors.update(batch.cursors)
        for source, tally in batch.trained.items():
            self._tallies[source] += tally
        self._passed += batch.passed
        self._batches += 1
        self._sample_bytes += batch.sample_bytes
        self._record(batch.quarantined)

    def skip(self, batch: Batch) -> None:
        """Count a batch that was committed, at whatever step, as one whose step was skipped."""
        for source, tally in batch.trained.items():
            self._tallies[source] = self._tallies[source] - tally
        self._passed += batch.as_skipped()

    def synchronise(self) -> Position:
        """Bring all ranks' commits together; every rank must call this after the same step."""
        passed = tally_passed(self._passed, self.manifest)
        shares = self._ranks.gather((self._cursors, dict(self._tallies), passed))
        position = self.position.advance(
            {lane: cursor for cursors, _, _ in shares for lane, cursor in cursors.items()},
            batches=self._batches,
        )
        for _, trained, (tallies, reasons) in shares:
            position = position.count("trained", trained.items()).add(tallies, reasons)
        self.position = position
        # A filtered stream passes over much: its list goes to rank 0 alone, which writes it.
        for share in self._ranks.collect(self._passed):
            self._tell(share)
        self._cursors, self._passed, self._batches, self._sample_bytes = {}, [], 0, 0
        self._tallies.clear()
        return self.position

    def _generation(self, plan: Plan) -> Generator[Batch, None, tuple[PassedOver, ...]]:
        """Yield the batches of one plan, with bytes and quarantined samples of all ranks.

        Returns:
            What the lanes that are at their end passed over in the batch that they could not fill.
        """
        batches = LaneBatches(
            plan=plan,
            cursors=self._own(self.position.cursors),
            first=self.position.batches,
            columns=self._columns(),
            manifest=self.manifest,
            reader=self._reader,
            select=self._select,
            crop=self._crop,
            labels=self._labels,
        )
        self._lane_bytes = LaneBytes(plan, self._sizes) if self._ranks.leads else None
        settings, pin_memory, metrics = (
            self._settings,
            self._ranks.device.type == "cuda",
            self._reader.metrics,
        )
        metrics.set("prefetch_queue_capacity_items", settings.workers * settings.prefetch)
        with open_loader(
            batches,
            workers=settings.workers,
            prefetch=settings.prefetch,
            pin_memory=pin_memory,
            on_take=lambda waiting: metrics.set("prefetch_queue_items", waiting),
        ) as items:
            for item in items:
                if item is None and not self._hooks.drain():
                    continue
                batch, quarantined = self._agree(item)
                if batch is None:
                    return quarantined
                yield batch
        raise AssertionError("a lane's end is always announced")

    def _agree(self, item: Item | None) -> tuple[Batch | None, tuple[PassedOver, ...]]:
        """Find out whether all ranks hold a batch and none wants to stop.

        Args:
            item: what this rank's loader gave; None: nothing yet, and a drain is asked for.

        Returns:
            This rank's batch, with bytes and quarantined samples of all ranks, or None; and what the lanes
            that are at their end passed over in the batch that they could not fill.

        Raises:
            StreamswavError: the first rank's that has one, on all ranks.
        """
        found = _bad(item)
        wishes = [
            isinstance(item, Failed),
            isinstance(item, Exhausted),
            self._hooks.drain(),
            self._ranks.leads and self._hooks.wants_save(),
            self._ranks.leads and self._hooks.wants_log(),
            len(found),
            item.sample_bytes if isinstance(item, Batch) else 0,
        ]
        failed, exhausted, drain, save, log, skipped, sample_bytes = self._ranks.total(
            [int(wish) for wish in wishes]
        )
        if failed:
            errors = self._ranks.gather(item.error if isinstance(item, Failed) else None)
            rank, error = next((rank, error) for rank, error in enumerate(errors) if error)
            if error.exit_code == EXIT_FAILED and not isinstance(item, Failed):
                raise PeerError(f"rank {rank}: {error}")  # the failure counts once, on the node where it is
            raise error
        self.drained, self.save_agreed, self.log_agreed = bool(drain), bool(save), bool(log)
        if drain:
            return None, ()
        # Where the batch cannot be filled, those that hold their share will read it again.
        counted = () if exhausted and not isinstance(item, Exhausted) else found
        bad = tuple(each for share in self._ranks.gather(counted) for each in share) if skipped else ()
        # Nothing found spends no budget, but the end of the probation may find it spent.
        on_probation = self.seen < self._settings.budgets.skip_probation
        if skipped or (self._on_probation and not on_probation):
            self._check_budget(bad)
        self._on_probation = on_probation
        if exhausted:
            return None, bad
        assert isinstance(item, Batch)
        return replace(item, quarantined=bad, sample_bytes=sample_bytes), ()

    def _check_budget(self, found: Sequence[PassedOver]) -> None:
        self._settings.budgets.check(
            self.position,
            found,
            trained=self.seen,
            trained_bytes=self.seen_bytes,
            run_bytes=self._run_bytes,
            evidence=self._evidence,
        )

    def _evidence(self, found: Sequence[PassedOver]) -> str:
        known = (each for each in self.unwritten if each.outcome == "quarantined")
        latest = [*known, *found][-3:]
        return "; ".join(map(self.describe, latest)) or "listed with the checkpoints"

    def describe(self, quarantined: PassedOver) -> str:
        """Name a quarantined stretch for people: shard, bytes, key, reason."""
        shard, key = self.shard_key(quarantined), f" {quarantined.key}" if quarantined.key else ""
        return f"{shard}[{quarantined.start}:{quarantined.stop}]{key}: {quarantined.reason}"

    def shard_key(self, quarantined: PassedOver) -> str:
        """Name its shard."""
        return self.manifest.shards[quarantined.shard].key

    def _columns(self) -> range:
        share = self.position.grid.columns // self._ranks.world_size
        return range(self._ranks.rank * share, (self._ranks.rank + 1) * share)

    def _own(self, cursors: Mapping[int, Cursor]) -> dict[int, Cursor]:
        columns = self._columns()
        return {lane: each for lane, each in cursors.items() if lane % self.position.grid.columns in columns}

    def _deal_again(self, plan: Plan, gone: Sequence[PassedOver]) -> None:
        """Deal what is left of the pass, and what came since, into a new generation, or end the pass."""
        given = self._batches > 0 or self.position.batches > 0
        self.synchronise()
        left = without(remaining(plan, self.position.cursors), gone)
        new = self._take_new()
        # Much that is passed over is progress as well; for little the loader is not started again.
        progressed = given or sum(each.ordinal is not None for each in gone) >= plan.grid.batch
        many = progressed and self._estimate(left, gone) > 2 * plan.grid.batch * plan.grid.rows
        if new or many:
            self._record(gone)
            self._enter(gather_pieces([*left, *new], turn=plan.turn))
            return
        named = self._name(self._without_lost(left, gone))
        if named is None:  # a drain: the position stays where it was, and what is gone will be met again
            return
        self._record(gone)
        self._enter(Deal(pieces=tuple(named), one_by_one=True))
        if _count(named) < plan.grid.batch:
            if self._growth is None:
                self._end_pass(named)
            else:
                self._await_new(named)

    def _enter(self, dealt: Deal) -> None:
        self.position = self.position.deal_again(dealt, manifest=self.manifest.digest)

    def _take_new(self) -> list[Piece]:
        """Return the shards that the position does not cover yet, after a look at what came since."""
        if self._growth is not None:
            grown = self._ranks.lead(self._growth.take)
            if grown:
                self.manifest = self.manifest.grown(*grown)
                self._reader.manifest = self.manifest
                self._measure()
                self._hooks.on_grown(self.manifest)
        covered = self.position.covered(self.manifest)
        return [Piece(index, self.position.turn) for index in range(covered, len(self.manifest.shards))]

    def _measure(self) -> None:
        """Weigh the shards, once for each manifest: there may be hundreds of thousands."""
        self._sizes = [shard.size for shard in self.manifest.shards]
        self._run_bytes = self.manifest.total_bytes(self.position.passes)

    def _await_new(self, named: Sequence[Piece]) -> None:
        """Wait until there is something new, nothing came for too long, or a drain is asked for."""
        assert self._growth is not None
        self._hooks.on_idle(True)
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            drain, late = self._ranks.total(
                [self._hooks.drain(), self._ranks.leads and self._growth.given_up(waited)]
            )
            if drain:
                self.drained = True
                return
            if new := self._take_new():
                self._hooks.on_idle(False)
                self._enter(gather_pieces([*named, *new], turn=self.position.turn))
                return
            if late:
                self._end_pass(named)
                return
            time.sleep(_LOOK_UP_SECONDS)

    def _estimate(self, left: Sequence[Piece], gone: Sequence[PassedOver]) -> float:
        """Samples in the pieces, from the mean size of those met so far."""
        seen = sum((self.position.total(outcome) for outcome in OUTCOMES), Tally())
        passed = [each for each in gone if each.ordinal is not None]
        samples = seen.samples + len(passed)
        mean = (seen.bytes + sum(each.stop - each.start for each in passed)) / max(1, samples)
        named = [piece for piece in left if piece.named() is not None]
        total = sum(bytes_left(piece, self._sizes) for piece in left if piece.named() is None)
        return _count(named) + (total / mean if mean else 0.0)

    def _name(self, left: Sequence[Piece]) -> list[Piece] | None:
        """Have what is left scanned, for all ranks; None where a drain is asked for meanwhile."""
        judge = _Judge(self._select, self.manifest, self._labels)
        scanned = self._run_errand(partial(name_samples, left, self._reader.open, judge))
        if scanned is None:
            return None
        named, passed = scanned
        self._check_budget(passed)
        self._record(passed)
        return named

    def _without_lost(self, left: Sequence[Piece], gone: Sequence[PassedOver]) -> list[Piece]:
        """Leave out pieces that name samples of a lost shard: nobody can read them any more."""
        met = (*self.position.damages, *gone)
        lost = {(each.shard, each.turn) for each in met if each.reason in LOST_REASONS}
        return [each for each in left if each.named() is None or (each.shard, each.turn) not in lost]

    def _run_errand(self, work: Callable[[], Answer]) -> Answer | None:
        """Have rank 0 see to it, for all ranks; None where a drain is asked for meanwhile."""
        workers, drain = self._settings.workers, self._hooks.drain
        answer = self._ranks.lead(lambda: run_errand(work, workers=workers, give_up=drain))
        self.drained = self.drained or answer is None
        return answer

    def _record(self, found: Sequence[PassedOver]) -> None:
        """Keep account of what was passed over; a damage that is met again counts once."""
        if not found:
            return
        fresh = self.position.unknown(found)
        self.position = self.position.record(fresh, self.manifest)
        self._tell(fresh)

    def _tell(self, passed: Sequence[PassedOver]) -> None:
        self.unwritten += passed
        for each in passed:
            self._hooks.on_passed_over(each)

    def _end_pass(self, left: Sequence[Piece]) -> None:
        """Carry the left-over into the next pass, or finish.

        Raises:
            ManifestError: not one batch could be filled.
        """
        following = self.position.next_turn(left)
        if following.finished:
            if following.seen.samples == 0:
                self._refuse_too_few(_count(left))
            left = self._sift(left)
            following = self.position.next_turn(left)
        if not self.drained:
            self.position = following

    def _sift(self, left: Sequence[Piece]) -> Sequence[Piece]:
        """Decode what is left over at the very end: what no batch could use is quarantined all the same.

        So what becomes of a sample does not depend on whether it is the order's last.
        """
        plan = Plan(replace(self.position.grid, batch=1, columns=1, rows=1), 0, 0, 0, (tuple(left),))
        lane = LaneBatches(
            plan, {}, 0, range(1), self.manifest, self._reader, self._select, self._crop, self._labels
        )
        found = self._run_errand(lane.sift)
        if found is None:
            return left
        self._check_budget(found)
        self._record(found)
        return without(left, found)

    def _refuse_too_few(self, samples: int) -> None:
        passed = sum(self.position.total(outcome).samples for outcome in ("excluded", "filtered"))
        hint = f", {passed} more were excluded or filtered" if passed else ""
        needed = f"; {self._labels.needed}" if self._labels and passed else ""
        raise ManifestError(
            f"the shards hold {samples} usable samples{hint}, fewer than one global batch "
            f"(training.batch = {self.position.grid.batch}); lower it or add data{needed}"
        )


def _count(named: Iterable[Piece]) -> int:
    """Samples that pieces name."""
    return sum(len(piece.named() or ()) for piece in named)


@dataclass(frozen=True)
class _Judge:
    """Tells of a sample whether it is trained; a process of its own may do so."""

    select: Selection
    manifest: Manifest
    labels: Labels | None

    def __call__(self, shard: int, sample: TarSample) -> tuple[str, str] | None:
        verdict = self.select.judge(sample, self.manifest.shards[shard].key)
        label = read_label(self.labels, sample)
        if verdict is None and isinstance(label, Unlabelled):
            return label.outcome, label.reason
        return verdict


def _bad(item: Item | None) -> tuple[PassedOver, ...]:
    """What all ranks must hear of now: what is quarantined; at the end of a generation all of it."""
    match item:
        case Batch():
            return item.quarantined
        case Exhausted():
            return item.passed_over
    return ()
