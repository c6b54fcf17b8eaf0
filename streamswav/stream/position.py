"""The position: how far a run has come in its stream. Plain data, never a pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from streamswav.errors import PositionError
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import LOST_REASONS, PassedOver, Tally, tally_one
from streamswav.stream.pieces import Cursor, Piece
from streamswav.stream.plan import ORDER_VERSION, Deal, Plan, gather_pieces, make_plan, remaining

Tallies = Mapping[str, tuple[Tally, ...]]


@dataclass(frozen=True)
class Position:
    """Everything the stream needs to go on.

    Attributes:
        manifest: hash of the manifest it belongs to, or of the part of it that was there then.
        grid: shape of the plan.
        seed: of the order.
        passes: over each source.
        turn: the pass, from 0.
        generation: how often this pass was dealt again.
        batches: batches given in this generation.
        cursors: by lane; a lane that is not in here has not been opened.
        carried: what the last pass left over, dealt into this one (generation 0).
        dealt: what the generation is dealt from, where it is not generation 0.
        tallies: for each outcome the samples of each source, all passes.
        reasons: samples passed over, by reason, all passes.
        damages: stretches that could not be parsed, all passes.
        finished: True once all passes are over; `carried` is then the final left-over.
    """

    manifest: str
    grid: Grid
    seed: int
    passes: tuple[int, ...] = (1,)
    turn: int = 0
    generation: int = 0
    batches: int = 0
    cursors: Mapping[int, Cursor] = field(default_factory=dict)
    carried: tuple[Piece, ...] = ()
    dealt: Deal | None = None
    tallies: Tallies = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    damages: tuple[PassedOver, ...] = ()
    finished: bool = False

    @property
    def turns(self) -> int:
        """Passes of the whole run: those over the source that has most."""
        return max(self.passes)

    @property
    def trained(self) -> int:
        """Samples trained, all passes."""
        return self.total("trained").samples

    @property
    def seen(self) -> Tally:
        """What optimizer steps were given, also those that were skipped: a run's progress, all passes."""
        return self.total("trained") + self.total("skipped_step")

    def total(self, outcome: str) -> Tally:
        """Return the tally of an outcome over all sources."""
        return sum(self.tallies.get(outcome, ()), Tally())

    def covered(self, manifest: Manifest) -> int:
        """Return how many of the manifest's shards this position knows; the others came later.

        Raises:
            PositionError: it belongs to another manifest.
        """
        covered = manifest.covered(self.manifest)
        if covered is None:
            raise PositionError(
                f"the run's position belongs to manifest {self.manifest}, these shards are {manifest.digest}:"
                " stream.urls lead elsewhere, or shards changed; use another run.directory for them"
            )
        return covered

    def plan(self, manifest: Manifest) -> Plan:
        """Return the plan this position is in.

        Raises:
            PositionError: it belongs to another manifest.
        """
        dealt = self.dealt
        if dealt is None:
            covered = self.covered(manifest)
            whole = manifest.of_turn(self.turn, self.passes, seed=self.seed, covered=covered)
            dealt = Deal(whole, self.carried)
        sizes = [shard.size for shard in manifest.shards]
        order = {"seed": self.seed, "turn": self.turn, "generation": self.generation}
        return make_plan(dealt, sizes, grid=self.grid, **order)

    def left(self, manifest: Manifest) -> list[Piece]:
        """Return what is left of this pass, or of the run where it is finished.

        Raises:
            PositionError: it belongs to another manifest.
        """
        return list(self.carried) if self.finished else remaining(self.plan(manifest), self.cursors)

    def advance(self, cursors: Mapping[int, Cursor], *, batches: int) -> Position:
        """Return the position after `batches` more batches of this generation."""
        return replace(self, batches=self.batches + batches, cursors={**self.cursors, **cursors})

    def count(self, outcome: str, by_source: Iterable[tuple[int, Tally]]) -> Position:
        """Return the position with samples of an outcome added, given as (source, tally)."""
        tallies = list(self.tallies.get(outcome) or [Tally()] * len(self.passes))
        for source, tally in by_source:
            tallies[source] += tally
        return replace(self, tallies={**self.tallies, outcome: tuple(tallies)})

    def unknown(self, found: Sequence[PassedOver]) -> list[PassedOver]:
        """Return what is new of this; damages may be met by several readers, and again after a restart."""
        met = any(each.ordinal is None for each in found)
        damages = {_place(each) for each in self.damages} if met else set()
        fresh = []
        for each in found:
            if each.ordinal is None:
                if _place(each) in damages:
                    continue
                damages.add(_place(each))
            fresh.append(each)
        return fresh

    def record(self, fresh: Sequence[PassedOver], manifest: Manifest) -> Position:
        """Return the position with what was passed over, all of it new."""
        position = self.add(*tally_passed(fresh, manifest))
        damages = tuple(each for each in fresh if each.ordinal is None)
        return replace(position, damages=(*self.damages, *damages)) if damages else position

    def add(self, tallies: Mapping[str, Mapping[int, Tally]], reasons: Mapping[str, int]) -> Position:
        """Return the position with samples passed over: tallies by outcome and source, numbers by reason."""
        position = self
        for outcome, by_source in tallies.items():
            position = position.count(outcome, by_source.items())
        return replace(position, reasons=dict(Counter(position.reasons) + Counter(reasons)))

    def deal_again(self, dealt: Deal, *, manifest: str | None = None, grid: Grid | None = None) -> Position:
        """Return the position at the start of a new generation of this pass."""
        return replace(
            self,
            manifest=manifest or self.manifest,
            grid=grid or self.grid,
            generation=self.generation + 1,
            batches=0,
            cursors={},
            carried=(),
            dealt=dealt,
        )

    def on_grid(self, manifest: Manifest, grid: Grid) -> Position:
        """Return the position with what is left dealt into another grid."""
        if grid == self.grid:
            return self
        if self.finished:
            return replace(self, grid=grid)
        return self.deal_again(gather_pieces(self.left(manifest), turn=self.turn), grid=grid)

    def with_passes(self, passes: tuple[int, ...]) -> Position:
        """Return the position for so many passes; a stream at its end goes on where more are asked for now.

        Raises:
            PositionError: the passes over one of several sources were changed.
        """
        if passes == self.passes:
            return self
        if len(passes) != len(self.passes) or len({*passes}) > 1 or len({*self.passes}) > 1:
            raise PositionError(
                f"the run began with stream.passes = {list(self.passes)}, now it is {list(passes)}: passes "
                "over several URLs can be changed only where all have the same number; set it back"
            )
        finished = self.finished and self.turn >= max(passes)
        return replace(self, passes=passes, finished=finished)

    def next_turn(self, left: Sequence[Piece]) -> Position:
        """Return the position at the start of the next pass, which begins with what this one left over."""
        return replace(
            self,
            turn=self.turn + 1,
            generation=0,
            batches=0,
            cursors={},
            carried=tuple(left),
            dealt=None,
            finished=self.turn + 1 >= self.turns,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads."""
        tallies = self.tallies.items()
        return {
            "order_version": ORDER_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "passes": list(self.passes),
            "grid": asdict(self.grid),
            "tallies": {outcome: [each.to_json() for each in by_source] for outcome, by_source in tallies},
            "reasons": dict(self.reasons),
            "cursors": {str(lane): cursor.to_json() for lane, cursor in sorted(self.cursors.items())},
            "carried": [piece.to_json() for piece in self.carried],
            "dealt": self.dealt and self.dealt.to_json(),
            "damages": [asdict(damage) for damage in self.damages],
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Position:
        """Read what `to_json` gave.

        Raises:
            PositionError: it was written with another order of samples.
        """
        if values["order_version"] != ORDER_VERSION:
            raise PositionError(
                f"the position was written with sample order {values['order_version']}, this version has "
                f"{ORDER_VERSION}: finish the pass with the version that began it"
            )
        tallies = values["tallies"].items()
        return Position(
            **{name: values[name] for name in _PLAIN},
            passes=tuple(values["passes"]),
            grid=Grid(**values["grid"]),
            tallies={outcome: tuple(map(Tally.from_json, by_source)) for outcome, by_source in tallies},
            reasons=dict(values["reasons"]),
            cursors={int(lane): Cursor.from_json(each) for lane, each in values["cursors"].items()},
            carried=tuple(Piece.from_json(each) for each in values["carried"]),
            dealt=values["dealt"] and Deal.from_json(values["dealt"]),
            damages=tuple(PassedOver(**each) for each in values["damages"]),
        )


def lost_bytes(found: Iterable[PassedOver]) -> int:
    """Return the bytes of lost shards; several lanes tell of one, each from where it was."""
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    for each in found:
        if each.reason in LOST_REASONS:
            start, stop = spans.get((each.turn, each.shard), (each.start, each.stop))
            spans[each.turn, each.shard] = (min(start, each.start), max(stop, each.stop))
    return sum(stop - start for start, stop in spans.values())


def tally_passed(
    found: Iterable[PassedOver], manifest: Manifest
) -> tuple[dict[str, dict[int, Tally]], Counter[str]]:
    """Return the samples among what was passed over: tallies by outcome and source, numbers by reason."""
    tallies: dict[str, dict[int, Tally]] = {}
    reasons: Counter[str] = Counter()
    for each in found:
        if each.ordinal is not None:
            shard, by_source = manifest.shards[each.shard], tallies.setdefault(each.outcome, {})
            one = tally_one(shard.digest, each.turn, each.ordinal, each.start, each.stop)
            by_source[shard.source] = by_source.get(shard.source, Tally()) + one
            reasons[each.reason] += 1
    return tallies, reasons


def _place(damage: PassedOver) -> tuple[int, int, int]:
    return damage.turn, damage.shard, damage.start


_PLAIN = ("manifest", "seed", "turn", "generation", "batches", "finished")
