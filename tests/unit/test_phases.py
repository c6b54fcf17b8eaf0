"""Phases of a rank's wall time: exclusive, and shared as a device's time is that works behind the host."""

import time

import pytest

from streamswav.training.phases import DEVICE_PHASES, DevicePhaseClock, PhaseClock


def test_phases_are_exclusive_and_add_up():
    clock = PhaseClock()
    clock.start()
    began = time.perf_counter()
    with clock.within("data_wait"):
        time.sleep(0.02)
        with clock.within("checkpoint"):
            time.sleep(0.03)
    with clock.within("forward_backward"):
        time.sleep(0.01)
        with clock.within("sinkhorn"):
            time.sleep(0.01)
        clock.enter("optimizer")  # holds until the whole step is over
        time.sleep(0.02)
    time.sleep(0.01)
    spent = clock.take()
    wall = time.perf_counter() - began
    least = {"data_wait": 0.02, "checkpoint": 0.03, "sinkhorn": 0.01, "optimizer": 0.02, "other": 0.01}
    assert all(spent[phase] >= seconds for phase, seconds in least.items()), spent
    assert sum(spent.values()) == pytest.approx(wall, rel=0.02)
    assert sum(clock.take().values()) < 0.01


class Event:
    """A device's event: at which of its milliseconds it was passed."""

    now = 0.0

    def record(self):
        self.at = Event.now

    def elapsed_time(self, later):
        return later.at - self.at


def test_the_hosts_time_is_shared_as_the_devices_own_is():
    clock = DevicePhaseClock(Event)
    clock.start()
    with clock.within("data_wait"):
        time.sleep(0.02)
    for phase, milliseconds in (("forward_backward", 60), ("sinkhorn", 10), ("optimizer", 30)):
        clock.enter(phase)  # asked for at once, done later
        Event.now += milliseconds
    clock.enter("other")
    before = clock.take()
    assert not set(before) & set(DEVICE_PHASES)
    assert before["data_wait"] >= 0.02
    with clock.waiting():
        time.sleep(0.1)
    spent = clock.settle()
    device = {phase: spent[phase] for phase in ("forward_backward", "sinkhorn", "optimizer")}
    assert sum(device.values()) >= 0.1
    assert device["sinkhorn"] / sum(device.values()) == pytest.approx(0.1)
    assert device["optimizer"] / sum(device.values()) == pytest.approx(0.3)
    assert all(spent.get(phase, 0) == 0 for phase in ("h2d", "allreduce"))


def test_events_are_used_again():
    made = []

    def make():
        made.append(Event())
        return made[-1]

    clock = DevicePhaseClock(make)
    for _ in range(50):
        with clock.within("h2d"):
            Event.now += 1
        clock.settle()
    assert len(made) <= 4
