"""The position: how far a run has come in its stream. Plain data, never a pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from streamswav.errors import PositionError
from streamswav.stream.manifest import Manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.plan import ORDER_VERSION, Cursor, Grid, Piece, Plan, first_deal


@dataclass(frozen=True)
class Position:
    """Everything the stream needs to go on.

    Attributes:
        manifest: digest of the manifest it belongs to.
        grid: shape of the plan.
        seed: of the order.
        turn: the pass, from 0.
        generation: how often this pass was dealt again.
        batches: batches given in this generation.
        cursors: by lane; a lane that is not in here has not been opened.
        carried: what the last pass left over, dealt into this one (generation 0).
        lanes: the pieces of every lane, where the plan is not generation 0's.
        trained: samples trained, all passes.
        trained_bytes: their bytes in the shards.
        quarantined: samples quarantined, by reason, all passes.
        damages: stretches that could not be parsed, all passes.
        finished: True once all passes are over; `carried` is then the final left-over.
    """

    manifest: str
    grid: Grid
    seed: int
    turn: int = 0
    generation: int = 0
    batches: int = 0
    cursors: Mapping[int, Cursor] = field(default_factory=dict)
    carried: tuple[Piece, ...] = ()
    lanes: tuple[tuple[Piece, ...], ...] | None = None
    trained: int = 0
    trained_bytes: int = 0
    quarantined: Mapping[str, int] = field(default_factory=dict)
    damages: tuple[PassedOver, ...] = ()
    finished: bool = False

    def plan(self, manifest: Manifest) -> Plan:
        """Return the plan this position is in.

        Raises:
            PositionError: it belongs to another manifest.
        """
        if self.manifest != manifest.digest:
            raise PositionError(
                f"the run's position belongs to manifest {self.manifest}, these shards are {manifest.digest}:"
                " stream.urls lead elsewhere, or shards changed; use another run.directory for them"
            )
        if self.lanes is not None:
            return Plan(self.grid, self.seed, self.turn, self.generation, self.lanes)
        sizes = [shard.size for shard in manifest.shards]
        return first_deal(sizes, self.carried, grid=self.grid, seed=self.seed, turn=self.turn)

    def advance(
        self, cursors: Mapping[int, Cursor], *, batches: int, samples: int, sample_bytes: int
    ) -> Position:
        """Return the position after `batches` more batches of this generation."""
        return replace(
            self,
            batches=self.batches + batches,
            cursors={**self.cursors, **cursors},
            trained=self.trained + samples,
            trained_bytes=self.trained_bytes + sample_bytes,
        )

    def unknown(self, found: Sequence[PassedOver]) -> list[PassedOver]:
        """Return what is new of this; damages may be met by several readers, and again after a restart."""
        damages = {_place(each) for each in self.damages} if found else set()
        fresh = []
        for each in found:
            if each.ordinal is None:
                if _place(each) in damages:
                    continue
                damages.add(_place(each))
            fresh.append(each)
        return fresh

    def record(self, fresh: Sequence[PassedOver]) -> Position:
        """Return the position with what was quarantined, all of it new."""
        if not fresh:
            return self
        counts = Counter(self.quarantined)
        counts.update(each.reason for each in fresh if each.ordinal is not None)
        damages = (each for each in fresh if each.ordinal is None)
        return replace(self, quarantined=dict(counts), damages=(*self.damages, *damages))

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads."""
        values = {name: getattr(self, name) for name in _PLAIN}
        return {
            "order_version": ORDER_VERSION,
            **values,
            "grid": asdict(self.grid),
            "quarantined": dict(self.quarantined),
            "cursors": {str(lane): cursor.to_json() for lane, cursor in sorted(self.cursors.items())},
            "carried": [piece.to_json() for piece in self.carried],
            "lanes": self.lanes and [[piece.to_json() for piece in lane] for lane in self.lanes],
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
        lanes = values["lanes"]
        return Position(
            **{name: values[name] for name in _PLAIN},
            grid=Grid(**values["grid"]),
            quarantined=dict(values["quarantined"]),
            cursors={int(lane): Cursor.from_json(each) for lane, each in values["cursors"].items()},
            carried=tuple(Piece.from_json(each) for each in values["carried"]),
            lanes=lanes and tuple(tuple(Piece.from_json(each) for each in lane) for lane in lanes),
            damages=tuple(PassedOver(**each) for each in values["damages"]),
        )


def _place(damage: PassedOver) -> tuple[int, int, int]:
    return damage.turn, damage.shard, damage.start


_PLAIN = (
    "manifest",
    "seed",
    "turn",
    "generation",
    "batches",
    "trained",
    "trained_bytes",
    "finished",
)
