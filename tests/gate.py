"""A place in the stream at which a process stands still until it is ended, or hears a signal.

`gate:passing` is a condition for `stream.where`; `at_gate` waits for the process to stand there.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

CONDITION = "gate:passing"

_KEY, _FLAG = "GATE_KEY", "GATE_FLAG"


def passing(sample):
    """Let every sample pass; stand still at the one that the environment names."""
    if sample.key == os.environ.get(_KEY):
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # A signal that comes before anybody waits for it is not lost in a pipe.
        signal.set_wakeup_fd(writing)
        Path(os.environ[_FLAG]).touch()
        os.read(reading, 1)
        signal.set_wakeup_fd(-1)
    return True


def closed_at(key, flag):
    """The environment of a process that stops before the sample of this key."""
    return {_KEY: key, _FLAG: str(flag)}


def at_gate(running, flag, *, and_then=lambda: True):
    """Wait until a process stands at the gate, and something else holds."""
    running.wait_until(lambda _: flag.exists() and and_then())
