"""SIGTERM and SIGINT: a request to stop, heard from a command's first moment on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from streamswav.errors import DrainedError


class Drain:
    """Whether somebody asked for a stop.

    Attributes:
        asked: a signal has come.
        patient: there is work to save first, so a signal is noted and no more. Before that it ends the
            command at once, wherever it waits.
    """

    def __init__(self) -> None:
        self.asked = self.patient = False

    def __call__(self) -> bool:
        """Tell whether a signal has come."""
        return self.asked

    def hear(self, _: int, __: FrameType | None) -> None:
        """Handle a signal; a second SIGINT is Python's own and ends at once; a second SIGTERM is nothing."""
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.patient:
            raise DrainedError("stopped by a signal before the first step: the same command begins again")


@contextmanager
def drain_on_signals() -> Iterator[Drain]:
    """Listen to SIGTERM and SIGINT for as long as the context lasts.

    After the first signal SIGTERM is ignored to the end of the process: a second must not change how it ends.
    """
    drain = Drain()
    before = {number: signal.signal(number, drain.hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            if not (drain.asked and number == signal.SIGTERM):
                signal.signal(number, handler)
