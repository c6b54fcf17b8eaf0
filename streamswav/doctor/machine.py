"""What the machine, or the container, allows: memory, cores, processes. Read from files only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 says "none" by the largest page-aligned number


@dataclass(frozen=True)
class Limit:
    """An amount, and what sets it; one that `is_set` can be raised, others are what there is."""

    amount: float
    source: str
    is_set: bool = True


@dataclass(frozen=True)
class Machine:
    """Where to look; tests look elsewhere.

    Attributes:
        cgroup: mount point of the control groups, version 1 or 2.
        proc: of the process file system.
        shm: shared memory, which loader processes hand batches over in.
        scratch: folder for temporary files; None: Python's choice.
    """

    cgroup: Path = Path("/sys/fs/cgroup")
    proc: Path = Path("/proc")
    shm: Path = Path("/dev/shm")  # noqa: S108 - it is looked at, not written to
    scratch: Path | None = None

    def memory(self) -> Limit | None:
        """Bytes of memory: the container's limit, or what the machine has left."""
        found = [
            Limit(float(text), str(file))
            for file, text in self._settings("memory", "memory.max", "memory.limit_in_bytes")
            if text.isdecimal() and int(text) < _UNLIMITED
        ]
        return _least([*found, *self._available()])

    def cores(self) -> Limit:
        """CPU cores: those this process may run on, or the quota, whichever is less."""
        found = [Limit(len(os.sched_getaffinity(0)), "affinity")]
        for file, text in self._settings("cpu", "cpu.max", "cpu.cfs_quota_us"):
            quota, _, period = text.partition(" ")
            if file.name == "cpu.cfs_quota_us":
                period = _read(file.with_name("cpu.cfs_period_us")) or "100000"
            if quota.isdecimal() and period.isdecimal():
                found.append(Limit(int(quota) / int(period), str(file)))
        return _least(found) or found[0]

    def tasks(self) -> Limit | None:
        """Processes and threads that the container may have."""
        found = self._settings("pids", "pids.max", "pids.max")
        return _least([Limit(int(text), str(file)) for file, text in found if text.isdecimal()])

    def driver(self) -> str | None:
        """Version of NVIDIA's driver; None: there is none."""
        text = _read(self.proc / "driver" / "nvidia" / "version")
        if text is None:
            return None
        words = text.splitlines()[0].split()
        return next((word for word in words if word[:1].isdigit() and "." in word), words[-1])

    def _available(self) -> Iterator[Limit]:
        for line in (_read(self.proc / "meminfo") or "").splitlines():
            if line.startswith("MemAvailable:"):
                yield Limit(int(line.split()[1]) * 1024, "free memory of the machine", is_set=False)

    def _settings(self, controller: str, new: str, old: str) -> Iterator[tuple[Path, str]]:
        """Yield what a controller is set to for this process: its own group, and those above that it sees."""
        for line in (_read(self.proc / "self" / "cgroup") or "").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root, name = (self.cgroup / controller, old) if controllers else (self.cgroup, new)
            own = root / path.strip("/")
            for folder in (own, *own.parents):
                text = _read(folder / name)
                if text is not None:
                    yield folder / name, text
                if folder == root:
                    break


def _least(limits: list[Limit]) -> Limit | None:
    return min(limits, key=lambda limit: limit.amount, default=None)


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
