"""Ranks that work at their own pace, and look at one another every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from streamswav.errors import DrainedError, StreamswavError
from streamswav.training.distributed import Ranks

ROUND_SECONDS = 5.0

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class _State(Generic[Facts]):
    """What a rank tells the others."""

    facts: Facts
    done: bool = False
    asked: bool = False
    error: StreamswavError | None = None


class Together(Generic[Facts]):
    """Lets ranks work without collectives, so that uneven work leaves nobody in one for long.

    They meet by the clock: who is done waits for the others' next look, a few seconds away, not for their
    end. There they learn who failed and who was asked to stop, and all end alike.

    Args:
        ranks: that work.
        facts: what this rank has to tell; plain data.
        on_facts: hears what all ranks told, on all ranks alike; it may raise.
        give_up: whether this rank was asked to stop.
        seconds: between two looks; by default `ROUND_SECONDS`.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        facts: Callable[[], Facts],
        on_facts: Callable[[Sequence[Facts]], None],
        give_up: Callable[[], bool],
        seconds: float | None = None,
    ) -> None:
        self._ranks, self._facts, self._on_facts, self._give_up = ranks, facts, on_facts, give_up
        seconds = ROUND_SECONDS if seconds is None else seconds
        self._seconds = seconds if ranks.world_size > 1 else 0.0
        self._met = time.monotonic()
        self._agreed = False

    def run(self, work: Callable[[], None]) -> None:
        """Do this rank's work, which calls `look` now and then; return once all ranks have done theirs.

        Raises:
            DrainedError: a rank was asked to stop before all were done.
            StreamswavError: what the work of a rank, or `on_facts`, raised.
        """
        try:
            work()
        except StreamswavError as error:
            if not self._agreed:
                self._meet(error=error)
            raise
        while not self._meet(done=True):
            pass

    def look(self) -> None:
        """Meet the others where it is time to. Raises as `run`."""
        if self._give_up() or time.monotonic() - self._met >= self._seconds:
            self._meet()

    def _meet(self, *, done: bool = False, error: StreamswavError | None = None) -> bool:
        """Tell and hear; return whether all are done."""
        states = self._ranks.gather(_State(self._facts(), done, self._give_up(), error))
        self._met = time.monotonic()
        self._agreed = True  # whatever is raised from here on is raised by all
        for state in states:
            if state.error is not None:
                raise state.error
        self._on_facts([state.facts for state in states])
        over = all(state.done for state in states)
        if not over and any(state.asked for state in states):
            raise DrainedError("stopped by a signal: the same command goes on")
        self._agreed = False
        return over
