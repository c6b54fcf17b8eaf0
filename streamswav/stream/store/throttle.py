"""One limit of requests in flight, shared by all threads: halved when a server throttles, then growing back.

Additive increase, multiplicative decrease, as TCP does it: a burst of "slow down" slows all readers of a
process together, where each would otherwise go on asking until its own pauses have grown.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable

PAUSE_SECONDS = 0.5


class Throttle:
    """Turns for requests to one kind of storage. Safe to use from several threads; nobody waits busily.

    Args:
        most: requests in flight at most.
        clock: monotonic seconds.

    Attributes:
        limit: how many may be in flight now, from 1 to `most`.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = most
        self._most, self._clock = most, clock
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._in_flight = 0
        self._changed_at = self._cut_at = -math.inf

    def enter(self, seconds: float) -> float | None:
        """Wait for a turn, first come, first served; each must be given back with `leave`.

        Args:
            seconds: how long to wait at most.

        Returns:
            When the turn came, on the clock; `None` if it did not.
        """
        with self._lock:
            if not self._waiting and self._in_flight < self.limit:
                self._in_flight += 1
                return self._clock()
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            came = turn.wait(max(seconds, 0.0))
        except BaseException:  # a signal's
            if self._given_up(turn):
                self.leave(-math.inf, "")
            raise
        return self._clock() if came or self._given_up(turn) else None

    def leave(self, began: float, outcome: str) -> None:
        """Give a turn back, with what came of it: ok, throttled, or anything else, which changes nothing.

        A pause brings one step up or one cut at most, so that the server's answer to the last one is heard
        first; for the same reason what began before a cut brings no other.
        """
        with self._lock:
            now = self._clock()
            if outcome == "ok" and self.limit < self._most and now >= self._changed_at + PAUSE_SECONDS:
                self.limit, self._changed_at = self.limit + 1, now
            elif outcome == "throttled" and began > self._cut_at and now >= self._cut_at + PAUSE_SECONDS:
                # Half of what there was: the limit itself may be far above it.
                self.limit = max(1, min(self.limit, self._in_flight) // 2)
                self._changed_at = self._cut_at = now
            self._in_flight -= 1
            while self._waiting and self._in_flight < self.limit:
                self._in_flight += 1
                self._waiting.popleft().set()

    def _given_up(self, turn: threading.Event) -> bool:
        """Stop waiting; tell whether the turn came nevertheless."""
        with self._lock:
            if not turn.is_set():
                self._waiting.remove(turn)
            return turn.is_set()


_THROTTLES: dict[tuple[int, str], Throttle] = {}


def shared_throttle(kind: str, most: int) -> Throttle:
    """Return this process's throttle for a kind of storage; `most` counts at the first call."""
    key = (os.getpid(), kind)
    return _THROTTLES.get(key) or _THROTTLES.setdefault(key, Throttle(most))
