"""Where the wall time of a training rank goes: one phase at a time, so that they add up to it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

DEVICE_PHASES = ("h2d", "forward_backward", "sinkhorn", "allreduce", "optimizer")
"""What a GPU works on while the host is ahead of it."""

MOST_MARKS = 4096


class PhaseClock:
    """Tells how long a rank was in each phase, on the host's clock.

    The phase is always exactly one, `other` where nothing else was said.
    """

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._phase, self._since = "other", time.perf_counter()

    def start(self) -> None:
        """Forget everything, and begin now."""
        self._spent.clear()
        self._phase, self._since = "other", time.perf_counter()

    def enter(self, phase: str) -> str:
        """Begin a phase, which ends the one before.

        Returns:
            The one before.
        """
        now, before = time.perf_counter(), self._phase
        self._spent[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Spend the context in a phase; then the one before goes on."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait within for the device, which still does what it was asked for."""
        with self.within("other"):
            yield

    def take(self) -> Mapping[str, float]:
        """Return the seconds by phase since the last time, as far as they can be told without a wait."""
        self.enter(self._phase)
        spent, self._spent = self._spent, defaultdict(float)
        return spent

    def settle(self) -> Mapping[str, float]:
        """Return the seconds by phase since the last time; the device has done what was asked of it."""
        return self.take()


class DevicePhaseClock(PhaseClock):
    """The same where a device works behind the host.

    What the host spends on phases of the device (launching, and waiting for it) is shared among these as the
    device's own time is, which events tell that are recorded as each phase begins. They are read only when
    the device has passed them. **Not yet run on a GPU.**

    Args:
        make_event: returns a new event with `record()` and, in milliseconds, `elapsed_time(later)`.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        super().__init__()
        self._make_event = make_event
        self._free: list[Any] = []
        self._marks: list[tuple[str, Any]] = []
        self._pool = 0.0

    def start(self) -> None:
        """Forget everything, and begin now."""
        super().start()
        self._pool, self._marks = 0.0, []

    def enter(self, phase: str) -> str:
        """Begin a phase, also on the device."""
        before = super().enter(phase)
        if len(self._marks) < MOST_MARKS and (phase in DEVICE_PHASES or before in DEVICE_PHASES):
            event = self._free.pop() if self._free else self._make_event()
            event.record()
            self._marks.append((phase, event))
        return before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait within for the device, which still does what it was asked for."""
        with self.within("forward_backward"):
            yield

    def take(self) -> Mapping[str, float]:
        """Return the seconds of phases that are the host's alone; those of the device are kept."""
        spent = dict(super().take())
        self._pool += sum(spent.pop(phase, 0.0) for phase in DEVICE_PHASES)
        return spent

    def settle(self) -> Mapping[str, float]:
        """Return the seconds by phase since the last time; the device has done what was asked of it."""
        spent = dict(self.take())
        own = self._device_seconds()
        whole = sum(own.values())
        for phase, seconds in own.items() if whole else {"forward_backward": 1.0}.items():
            spent[phase] = self._pool * seconds / (whole or 1.0)
        self._pool = 0.0
        return spent

    def _device_seconds(self) -> Mapping[str, float]:
        """Read the events, but the last one, from which the time after it will count."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if phase in DEVICE_PHASES:
                seconds[phase] += begun.elapsed_time(ended) / 1000
        self._free += [event for _, event in self._marks]
        self._marks.clear()
        return seconds


def make_clock(device: torch.device) -> PhaseClock:
    """Return the clock for a device."""
    if device.type == "cpu":
        return PhaseClock()
    return DevicePhaseClock(partial(getattr(torch, device.type).Event, enable_timing=True))
