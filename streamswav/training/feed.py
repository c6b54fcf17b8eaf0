"""Batches for the trainer, across generations and passes, agreed among the ranks one step ahead.

No rank enters a step that another will not reach: before a batch is handed out, all ranks have said over
gloo on the CPU that they hold it, and whether anybody wants to drain, save or give up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streamswav.crops import MultiCrop
from streamswav.errors import BudgetSpentError, ManifestError
from streamswav.loader import Batch, Exhausted, Failed, Item, LaneBatches, open_loader
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.plan import (
    Cursor,
    Piece,
    Plan,
    bytes_left,
    check_grid,
    deal,
    deal_samples,
    remaining,
    split_pieces,
    without,
)
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import name_samples
from streamswav.training.distributed import Ranks


@dataclass(frozen=True)
class FeedSettings:
    """What the feed needs of the configuration.

    Attributes:
        passes: over the manifest.
        workers: loader processes a rank.
        prefetch: batches ahead, a worker.
        skip_ratio: share of samples that may be quarantined.
        skip_probation: samples before the share is looked at.
    """

    passes: int
    workers: int
    prefetch: int
    skip_ratio: float
    skip_probation: int


class Feed:
    """Iterates over this rank's batches and keeps the position that the trainer commits.

    Attributes:
        position: the position of all ranks: what is quarantined as of now, all else as of the last
            `synchronise`.
        drained: a rank was asked to stop; the iteration has ended early, on all ranks alike.
        save_agreed: rank 0 wishes a checkpoint after this step.
        log_agreed: rank 0 wishes a log line after this step.
        unwritten: what was quarantined since the list was emptied last.
    """

    def __init__(
        self,
        manifest: Manifest,
        position: Position,
        *,
        settings: FeedSettings,
        reader: ShardReader,
        crop: MultiCrop,
        ranks: Ranks,
        drain: Callable[[], bool] = lambda: False,
        wants_save: Callable[[], bool] = lambda: False,
        wants_log: Callable[[], bool] = lambda: False,
        on_quarantined: Callable[[PassedOver], None] = lambda _: None,
    ) -> None:
        check_grid(position.grid, world_size=ranks.world_size, workers=settings.workers)
        self.manifest, self.position = manifest, position
        self._settings, self._reader, self._crop, self._ranks = settings, reader, crop, ranks
        self._drain, self._wants_save, self._wants_log = drain, wants_save, wants_log
        self._on_quarantined = on_quarantined
        self._sizes = [shard.size for shard in manifest.shards]
        self._cursors: dict[int, Cursor] = {}
        self._sample_bytes = 0
        self._batches = 0
        self.drained = False
        self.save_agreed = self.log_agreed = False
        self.unwritten: list[PassedOver] = []

    @property
    def trained(self) -> int:
        """Samples trained by all ranks, this moment."""
        return self.position.trained + self._batches * self.position.grid.batch

    @property
    def committed_bytes(self) -> int:
        """Bytes in the shards of the samples trained by all ranks, this moment."""
        return self.position.trained_bytes + self._sample_bytes

    @property
    def skipped(self) -> int:
        """Samples and stretches quarantined by all ranks, this moment."""
        return sum(self.position.quarantined.values()) + len(self.position.damages)

    def __iter__(self) -> Iterator[Batch]:
        while not (self.position.finished or self.drained):
            plan = self.position.plan(self.manifest)
            gone = yield from self._generation(plan)
            if not self.drained:
                self._deal_again(plan, gone)

    def commit(self, batch: Batch) -> None:
        """Advance the position past a batch whose optimizer step is done."""
        self._cursors.update(batch.cursors)
        self._batches += 1
        self._sample_bytes += batch.sample_bytes
        self._record(batch.quarantined)

    def synchronise(self) -> Position:
        """Bring all ranks' commits together; every rank must call this after the same step."""
        shares = self._ranks.gather(self._cursors)
        self.position = self.position.advance(
            {lane: cursor for share in shares for lane, cursor in share.items()},
            batches=self._batches,
            samples=self._batches * self.position.grid.batch,
            sample_bytes=self._sample_bytes,
        )
        self._cursors, self._batches, self._sample_bytes = {}, 0, 0
        return self.position

    def _generation(self, plan: Plan) -> Generator[Batch, None, tuple[PassedOver, ...]]:
        """Yield the batches of one plan, with bytes and quarantined samples of all ranks.

        Returns:
            What was found bad, on any rank, in the batch that could not be filled.
        """
        batches = LaneBatches(
            plan=plan,
            cursors=self._own(self.position.cursors),
            first=self.position.batches,
            columns=self._columns(),
            reader=self._reader,
            crop=self._crop,
        )
        settings, pin_memory = self._settings, self._ranks.device.type == "cuda"
        with open_loader(
            batches, workers=settings.workers, prefetch=settings.prefetch, pin_memory=pin_memory
        ) as items:
            for item in items:
                if item is None and not self._drain():
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
            This rank's batch, with bytes and quarantined samples of all ranks, or None; and what was found
            bad in the batch that could not be filled.

        Raises:
            StreamswavError: the first rank's that has one, on all ranks.
        """
        found = item.quarantined if isinstance(item, Batch | Exhausted) else ()
        wishes = [
            isinstance(item, Failed),
            isinstance(item, Exhausted),
            self._drain(),
            self._ranks.leads and self._wants_save(),
            self._ranks.leads and self._wants_log(),
            len(found),
            item.sample_bytes if isinstance(item, Batch) else 0,
        ]
        failed, exhausted, drain, save, log, skipped, sample_bytes = self._ranks.total(
            [int(wish) for wish in wishes]
        )
        if failed:
            errors = self._ranks.gather(item.error if isinstance(item, Failed) else None)
            raise next(error for error in errors if error)
        self.drained, self.save_agreed, self.log_agreed = bool(drain), bool(save), bool(log)
        if drain:
            return None, ()
        # Where the batch cannot be filled, those that hold their share will read it again.
        counted = () if exhausted and not isinstance(item, Exhausted) else found
        bad = tuple(each for share in self._ranks.gather(counted) for each in share) if skipped else ()
        self._check_budget(bad)
        if exhausted:
            return None, bad
        assert isinstance(item, Batch)
        return replace(item, quarantined=bad, sample_bytes=sample_bytes), ()

    def _check_budget(self, found: Sequence[PassedOver]) -> None:
        skipped = self.skipped + len(found)
        seen = self.trained + skipped
        if seen < self._settings.skip_probation or skipped <= self._settings.skip_ratio * seen:
            return
        latest = [*self.unwritten, *found][-3:]
        shown = "; ".join(map(self.describe, latest)) or "listed with the checkpoints"
        raise BudgetSpentError(
            f"{skipped} of {seen} samples could not be used, more than stream.skip_ratio = "
            f"{self._settings.skip_ratio} allows; the latest: {shown}"
        )

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
        """Deal what is left of the pass into a new generation, or end the pass."""
        progressed = self._batches > 0 or self.position.batches > 0
        self.synchronise()
        self._record(gone)
        consumed = [(each.shard, each.turn, each.ordinal) for each in gone if each.ordinal is not None]
        left = without(remaining(plan, self.position.cursors), consumed)
        order = {"seed": plan.seed, "turn": plan.turn, "generation": plan.generation + 1}
        if progressed and self._estimate(left) > 2 * plan.grid.batch * plan.grid.rows:
            pieces, sizes = split_pieces(left, self._sizes, lanes=plan.grid.lanes)
            self._enter(deal(pieces, sizes, grid=plan.grid, **order))
            return
        named = self._name(left)
        samples = sum(len(piece.named() or ()) for piece in named)
        if samples >= plan.grid.batch:
            self._enter(deal_samples(named, grid=plan.grid, **order))
        else:
            self._end_pass(named, samples)

    def _enter(self, plan: Plan) -> None:
        self.position = replace(
            self.position, generation=plan.generation, batches=0, cursors={}, carried=(), lanes=plan.lanes
        )

    def _estimate(self, left: Sequence[Piece]) -> float:
        """Samples in the pieces, from the mean size of those trained so far."""
        mean = self.position.trained_bytes / max(1, self.position.trained)
        total = sum(bytes_left(piece, self._sizes) for piece in left)
        return total / mean if mean else 0.0

    def _name(self, left: Sequence[Piece]) -> list[Piece]:
        """Rank 0 scans what is left, for all."""
        named, damages = self._ranks.lead(lambda: name_samples(left, self._reader.open))
        self._record(damages)
        return named

    def _record(self, found: Sequence[PassedOver]) -> None:
        """Keep account of what was quarantined; a damage that is met again counts once."""
        fresh = self.position.unknown(found)
        self.position = self.position.record(fresh)
        self.unwritten += fresh
        for each in fresh:
            self._on_quarantined(each)

    def _end_pass(self, left: Sequence[Piece], samples: int) -> None:
        """Carry the left-over into the next pass, or finish.

        Raises:
            ManifestError: not one batch could be filled.
        """
        if self.position.trained == 0:
            raise ManifestError(
                f"the shards hold {samples} usable samples, fewer than one global batch "
                f"(training.batch = {self.position.grid.batch}); lower it or add data"
            )
        turn = self.position.turn + 1
        self.position = replace(
            self.position,
            turn=turn,
            generation=0,
            batches=0,
            cursors={},
            carried=tuple(left),
            lanes=None,
            finished=turn >= self._settings.passes,
        )
