"""Values that several processes keep in one folder, for one endpoint to add up.

prometheus_client keeps a process' values in files that carry its number, so that each generation of loader
processes would leave files behind for as long as the pod lives. Here a process takes the lowest number that
no living process holds, and goes on with the files of the one that held it before: what a dead process
counted stays counted, and there are never more files than processes at one time. A number is held by a lock
that the kernel lets go of however the process ends.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prometheus_client import CollectorRegistry, Metric, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from streamswav.heartbeat import METRICS_VARIABLE
from streamswav.telemetry.families import FAMILIES, PREFIX

FILE_BYTES = 1 << 15
_LOCK = "streamswav-{}.lock"
_KINDS = ("counter", "histogram", "gauge_mostrecent", "gauge_livemostrecent", "gauge_livesum")


def shared_folder() -> Path | None:
    """Return the folder that the processes of this pod share; None: this process is on its own."""
    folder = os.environ.get(METRICS_VARIABLE)
    return Path(folder) if folder else None


def share_values() -> None:
    """Have the values of metrics that are made from here on kept in the shared folder, where there is one."""
    if (folder := shared_folder()) is not None:
        _share_values(folder)


@functools.cache
def _share_values(folder: Path) -> None:
    # The documented way to have files named by something else than the process' number.
    values.ValueClass = values.MultiProcessValue(Number(folder))  # type: ignore[no-untyped-call]


class Number:
    """The number of this process in the folder: called, it returns it; a forked child gets its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process, self._number = folder, 0, ""
        self._file: IO[bytes] | None = None

    def __call__(self) -> str:
        """Return the number, as text without an underscore."""
        if os.getpid() != self._process:
            self._file, self._number = _take_number(self._folder)
            self._process = os.getpid()
        return self._number


class SharedCollector(MultiProcessCollector):
    """Reads the folder; what gauges tell of living processes is forgotten with them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, path=str(folder))  # type: ignore[no-untyped-call]
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Return the families, by name; one of which nobody has told anything is there without values."""
        forget_dead(self._folder)
        files = [str(file) for file in self._folder.glob("*.db") if _begun(file)]
        found: Iterable[Metric] = self.merge(files, accumulate=True)  # type: ignore[no-untyped-call]
        names = {f.name: PREFIX + f.name.removesuffix("_total") for f in FAMILIES.values()}
        metrics = {names[f.name]: Metric(names[f.name], f.text, f.kind) for f in FAMILIES.values()}
        metrics |= {metric.name: metric for metric in found}
        return [metrics[name] for name in sorted(metrics)]


def _begun(file: Path) -> bool:
    """Whether there is something in a file: for a moment after a process makes one it is empty."""
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False


def collected_registry(folder: Path) -> CollectorRegistry:
    """Return a registry that gives what the processes of a folder have there."""
    registry = CollectorRegistry()
    registry.register(SharedCollector(folder))
    return registry


def forget_dead(folder: Path, *, counts: bool = False) -> None:
    """Remove what gauges told of processes that have ended; `counts`: all that is theirs."""
    for path in sorted(folder.glob(_LOCK.format("*"))):
        number = path.stem.partition("-")[2]
        with _locked(path) as free:
            if free:
                mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]
            for kind in _KINDS if free and counts else ():
                (folder / f"{kind}_{number}.db").unlink(missing_ok=True)


def _take_number(folder: Path) -> tuple[IO[bytes], str]:
    """Lock the lowest number that is free, and make room for its files.

    Raises:
        OSError: the folder is gone or full.
    """
    for number in map(str, itertools.count()):
        file = (folder / _LOCK.format(number)).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]
        for kind in _KINDS:
            _reserve(folder / f"{kind}_{number}.db")
        return file, number
    raise AssertionError("numbers do not end")


def _reserve(path: Path) -> None:
    """Take the disk's room for a file at once: a page that finds none later would be a bus error."""
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, FILE_BYTES)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a number for a moment; gives whether it was free, and so nobody's who lives."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
