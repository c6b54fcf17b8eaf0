"""The values of the families, of one process.

A process sets what it knows: its role says which families are its to feed, and what it says of others goes
nowhere. So no value of the run is counted twice, and no pod exports a false 0.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from streamswav.telemetry.families import FAMILIES, PREFIX, RUN_STATES, Family, Feeder
from streamswav.telemetry.multiprocess import share_values


class Role(Enum):
    """What a process is; the value: the families that it feeds, by who knows them."""

    ALONE = ("leader", "state", "rank", "reader", "pod")
    LEADER = ("leader", "state", "rank", "reader")
    RANK = ("rank", "reader")
    LOADER = ("reader",)
    LAUNCHER = ("pod",)
    FIRST_LAUNCHER = ("pod", "state")
    NONE = frozenset[Feeder]()  # Python 3.11.2, which Debian has, makes something else of an empty tuple


class Metrics:
    """The families that a process feeds.

    Where processes share a folder (`multiprocess`) the values lie there; otherwise they are in the registry.

    Args:
        role: of this process.
        registry: for the families; by default one of its own, so that runs in one process do not meet.
    """

    def __init__(self, role: Role = Role.ALONE, registry: CollectorRegistry | None = None) -> None:
        fed: Collection[Feeder] = role.value
        if fed:
            share_values()
        self.role, self.registry = role, registry or CollectorRegistry()
        self._families = {f.name: _build(f, self.registry) for f in FAMILIES.values() if f.fed_by in fed}
        self._children: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}
        if role is not Role.LOADER:
            self._begin()

    def __reduce__(self) -> tuple[Callable[[bool], Metrics], tuple[bool]]:
        """Become, in a loader process, that process' own; its values come together in the shared folder."""
        return _of_loader_process, (self.role is not Role.NONE,)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge; `name` is without the prefix."""
        if (gauge := self._find(name, labels)) is not None:
            assert isinstance(gauge, Gauge)
            gauge.set(value)

    def add(self, name: str, amount: float = 1, *labels: str) -> None:
        """Raise a counter."""
        if (counter := self._find(name, labels)) is not None:
            assert isinstance(counter, Counter)
            counter.inc(amount)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        if (histogram := self._find(name, labels)) is not None:
            assert isinstance(histogram, Histogram)
            histogram.observe(value)

    def count_request(self, outcome: str, seconds: float, received: int) -> None:
        """Count one attempt over the network, as a store tells of it."""
        self.add("s3_requests_total", 1, outcome)
        self.observe("s3_request_duration_seconds", seconds)
        self.add("s3_received_bytes_total", received)

    def note(self, readings: Mapping[str, float]) -> None:
        """Set those of a task's readings that have a family; `gradient_norm/trunk` is one with a label."""
        for name, value in readings.items():
            family, _, label = name.partition("/")
            if family in FAMILIES and math.isfinite(value):
                self.set(family, value, *([label] if label else []))

    def set_state(self, state: str) -> None:
        """Set the one state that the run is in."""
        self.choose("run_state", state, RUN_STATES)

    def choose(self, name: str, chosen: str, among: Iterable[str]) -> None:
        """Set the gauge of one label to 1, and those of the others to 0."""
        for each in among:
            self.set(name, float(each == chosen), each)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds within to a counter."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def _find(self, name: str, labels: tuple[str, ...]) -> Counter | Gauge | Histogram | None:
        if (child := self._children.get((name, *labels))) is not None:
            return child
        if name not in FAMILIES:
            raise KeyError(name)
        if (family := self._families.get(name)) is None:
            return None
        child = family.labels(*labels) if labels else family
        self._children[(name, *labels)] = child
        return child

    def _begin(self) -> None:
        """Export known labels as 0, and moments as this one."""
        now = time.time()
        for name in self._families:
            family = FAMILIES[name]
            if family.moment:
                self.set(name, now)
            for labels in product(*family.labels.values()) if family.labels else ():
                self._find(name, labels)
                if family.kind == "gauge":
                    self.set(name, 0, *labels)
        if "run_state" in self._families:
            self.set_state("init")


def _build(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, labels = f"{PREFIX}{family.name}", tuple(family.labels)
    if family.kind == "gauge":
        return Gauge(name, family.text, labels, registry=registry, multiprocess_mode=family.mode)
    if family.kind == "counter":
        return Counter(name, family.text, labels, registry=registry)
    return Histogram(name, family.text, labels, buckets=family.buckets, registry=registry)


def _of_loader_process(counting: bool) -> Metrics:
    return _loader_metrics() if counting else Metrics(Role.NONE)


@functools.cache
def _loader_metrics() -> Metrics:
    """Return the one of this process: two would each write its own count over the other's."""
    return Metrics(Role.LOADER)
