"""What a launcher tells of its pod, whatever becomes of the ranks: their ends, the run's state, /status."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamswav.errors import EXIT_DONE, EXIT_RETRY
from streamswav.gang import Gang, Member, Stop
from streamswav.telemetry.exporter import Endpoint
from streamswav.telemetry.metrics import Metrics, Role
from streamswav.telemetry.status import read_status

SCRAPED_SECONDS = 300.0
DRAINED_SECONDS = 2.0
_LOOK_SECONDS = 0.05


class Pod:
    """The ranks of this machine, over all their starts.

    Args:
        node: number of this launcher; rank 0 is with the first.
    """

    def __init__(self, node: int) -> None:
        self.metrics = Metrics(Role.LAUNCHER if node else Role.FIRST_LAUNCHER)
        self._node, self._folder = node, Path()
        self._gang: Gang | None = None
        self._attempt = 0
        self._state = "init"
        self._told: Mapping[str, Any] = {}

    def begin(self, gang: Gang, folder: Path, attempt: int) -> None:
        """Take note of a start of the ranks, which share this folder with the launcher."""
        self._gang, self._folder, self._attempt = gang, folder, attempt
        self._enter("init")

    def keep_status(self) -> None:
        """Keep what rank 0 told last: its folder goes."""
        self._told = read_status(self._folder) or self._told

    def ended(self, reason: str) -> None:
        """Count a rank that ended."""
        self.metrics.add("worker_exits_total", 1, reason)

    def end(self, code: int, stop: Stop) -> None:
        """Tell how it ended, which a rank 0 that was killed could not."""
        drained = stop.asked and code == EXIT_RETRY
        self._enter("done" if code == EXIT_DONE else "draining" if drained else "failed")

    def ready(self) -> bool:
        """Tell whether the ranks are started."""
        return self._gang is not None and bool(self._gang.members)

    def status(self) -> Mapping[str, Any]:
        """Return what rank 0 told last, and what is known of the ranks of this machine."""
        told = read_status(self._folder) or self._told
        gang = self._gang
        state = self._state if self._state != "init" else told.get("state", "init")
        ranks = [_describe(member) for member in gang.members] if gang else []
        return {**told, "state": state, "attempt": self._attempt, "node": self._node, "ranks": ranks}

    def _enter(self, state: str) -> None:
        self._state = state
        self.metrics.set_state(state)


def linger(endpoint: Endpoint | None, seconds: float, stop: Stop) -> None:
    """Wait for one more scrape, so that the last state is seen, if somebody has been scraping.

    Args:
        endpoint: of this pod, if it has one.
        seconds: how long at most; where a signal has come or comes, not long.
        stop: what the launcher's signals ask for.
    """
    began = time.monotonic()
    if endpoint is None or began - endpoint.scraped > SCRAPED_SECONDS:
        return
    while endpoint.scraped <= began:
        limit = min(seconds, DRAINED_SECONDS) if stop.asked else seconds
        if stop.now or time.monotonic() - began >= limit:
            return
        time.sleep(_LOOK_SECONDS)


def _describe(member: Member) -> dict[str, Any]:
    beat = member.beat
    told: dict[str, Any] = {"rank": member.rank, "local_rank": member.local_rank, "pid": member.process.pid}
    if member.code is None:
        return {**told, "phase": beat.phase, "phase_seconds": round(time.monotonic() - beat.since, 1)}
    return {**told, "exit_code": member.code, "reason": member.reason}
