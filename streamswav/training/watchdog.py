"""Ends a run that hangs: each phase has a limit, and a rank says which phase it is in.

Under the launcher the launcher looks; a rank without one has a thread of its own that does.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from streamswav.config import WatchdogSection
from streamswav.errors import EXIT_RETRY
from streamswav.heartbeat import Beat, Heartbeat, describe_hang
from streamswav.telemetry.logs import own_log

LOOK_SECONDS = 0.5

Phase = Literal["startup", "step", "checkpoint", "evaluation", "waiting"]


class Watchdog:
    """Keeps the phase that this rank is in.

    Args:
        section: the limits; `waiting` has none.
        heartbeat: where the launcher looks; None: nobody does.
    """

    def __init__(self, section: WatchdogSection | None = None, heartbeat: Heartbeat | None = None) -> None:
        section = section or WatchdogSection()
        self._limits: dict[str, float] = {
            "startup": section.startup_seconds,
            "step": section.step_seconds,
            "checkpoint": section.checkpoint_seconds,
            "evaluation": section.evaluation_seconds,
            "waiting": 0,
        }
        self._heartbeat = heartbeat
        self.enter("startup")

    def enter(self, phase: Phase) -> None:
        """Begin a phase, or the same one anew: its seconds count from now."""
        self.beat = Beat(time.monotonic(), self._limits[phase], phase)
        if self._heartbeat is not None:
            self._heartbeat.write(self.beat)

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Spend the context in a phase; then the one before begins anew."""
        before: Phase = self.beat.phase  # type: ignore[assignment]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


@contextmanager
def watch(section: WatchdogSection, heartbeat: Heartbeat | None, *, rank: int = 0) -> Iterator[Watchdog]:
    """Watch this rank for as long as the context lasts, or let the launcher do so."""
    watchdog = Watchdog(section, heartbeat)
    if heartbeat is not None:
        yield watchdog
        return
    over = threading.Event()
    thread = threading.Thread(target=_look, args=(watchdog, over, rank), name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _look(watchdog: Watchdog, over: threading.Event, rank: int) -> None:
    """End the process, stacks first, once its phase is overdue.

    Where the interpreter is stuck this thread is, too: so at each look it sets a timer in C, which dumps the
    stacks and ends the process (with exit code 1) unless the next look sets it anew.
    """
    while not over.wait(LOOK_SECONDS):
        beat = watchdog.beat
        if beat.overdue and watchdog.beat is beat:
            _tell_hang(f"{describe_hang(beat, rank)}; it is ended")
            os._exit(EXIT_RETRY)
        if beat.limit:
            left = beat.since + beat.limit - time.monotonic()
            faulthandler.dump_traceback_later(max(0.0, left) + 4 * LOOK_SECONDS, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()


def _tell_hang(why: str) -> None:
    """Tell the stacks of all threads, and why they are told."""
    try:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            own_log().tell("stacks", "where all threads are", level="error", stacks=file.read().strip())
    except OSError:  # no disk to write them to
        faulthandler.dump_traceback(all_threads=True)
    own_log().fail(why, EXIT_RETRY)
