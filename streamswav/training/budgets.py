"""How much may be passed over before a run ends: samples that cannot be used, and shards that are lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamswav.errors import BudgetSpentError
from streamswav.stream.outcomes import LOST_REASONS, PassedOver
from streamswav.stream.position import Position, lost_bytes


@dataclass(frozen=True)
class Budgets:
    """The two budgets; excluded and filtered samples spend neither.

    Attributes:
        skip_ratio: share of samples that may be quarantined.
        skip_probation: samples before the share is looked at.
        shard_ratio: share of the run's bytes in shards that may be missing or changed. Up to the same share,
            a stretch that cannot be parsed weighs as one sample, so that one broken shard that comes early
            does not end a long run.
    """

    skip_ratio: float
    skip_probation: int
    shard_ratio: float

    def check(
        self,
        position: Position,
        found: Sequence[PassedOver],
        *,
        trained: int,
        trained_bytes: int,
        run_bytes: int,
        evidence: Callable[[Sequence[PassedOver]], str],
    ) -> None:
        """Hold what was quarantined before, and what is found now, to the budgets.

        Args:
            position: what it counts already.
            found: passed over now; what the position knows does not count again.
            trained: samples so far.
            trained_bytes: theirs, from which follows how many samples a damage stands for.
            run_bytes: of the shards of all passes.
            evidence: describes the latest of it.

        Raises:
            BudgetSpentError: one of them is spent.
        """
        fresh = [each for each in position.unknown(found) if each.outcome == "quarantined"]
        if any(each.reason in LOST_REASONS for each in fresh):
            self._check_lost(position, fresh, run_bytes, evidence)
        damages = [*position.damages, *(each for each in fresh if each.ordinal is None)]
        few = sum(each.stop - each.start for each in damages) <= self.shard_ratio * run_bytes
        mean = math.inf if few or not trained else trained_bytes / trained
        skipped = position.total("quarantined").samples
        skipped += sum(_weigh(each, mean) for each in (*position.damages, *fresh))
        seen = trained + skipped
        if seen >= self.skip_probation and skipped > self.skip_ratio * seen:
            raise BudgetSpentError(
                f"{skipped} of {seen} samples could not be used, more than stream.skip_ratio = "
                f"{self.skip_ratio} allows; the latest: {evidence(fresh)}"
            )

    def _check_lost(
        self,
        position: Position,
        fresh: Sequence[PassedOver],
        run_bytes: int,
        evidence: Callable[[Sequence[PassedOver]], str],
    ) -> None:
        lost = lost_bytes([*position.damages, *fresh])
        if lost > self.shard_ratio * run_bytes:
            raise BudgetSpentError(
                f"{lost:,} bytes of {run_bytes:,} are in shards that are gone or were changed, more "
                f"than stream.shard_ratio = {self.shard_ratio} allows; the latest: {evidence(fresh)}; bring "
                "them back and start again, or raise it"
            )


def _weigh(found: PassedOver, mean: float) -> int:
    """Samples that it stands for: a damage for as many as its bytes usually hold, one at least."""
    if found.reason in LOST_REASONS:
        return 0
    return 1 if found.ordinal is not None else max(1, round((found.stop - found.start) / mean))
