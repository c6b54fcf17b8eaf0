"""What a rank and its launcher share: a few bytes that say where the rank is, and its stacks on request."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

AGENT = "agent"  # name of the launcher's thread that waits for ranks and nodes
FOLDER_VARIABLE = "STREAMSWAV_GANG_FOLDER"
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name
STACKS_SIGNAL = signal.SIGUSR1

_FORMAT = struct.Struct("=dd16s")
_PARENT_FILE = "launcher"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        since: time.monotonic(), which all processes of a machine share, when it entered the phase; 0: it has
            entered none yet.
        limit: seconds that the phase may take; 0: as long as it likes.
        phase: its name.
    """

    since: float
    limit: float
    phase: str

    @property
    def overdue(self) -> bool:
        """Whether the phase has taken longer than it may."""
        return self.limit > 0 and time.monotonic() - self.since > self.limit


class Heartbeat:
    """A rank's beat in a file that its launcher reads; writing it costs a microsecond and no system call."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), _FORMAT.size)

    def write(self, beat: Beat) -> None:
        """Tell where this rank is. The time goes first: no reader sees an old one with a new limit."""
        _FORMAT.pack_into(self._bytes, 0, beat.since, beat.limit, beat.phase.encode())

    def read(self) -> Beat:
        """Return what the rank told last."""
        since, limit, phase = _FORMAT.unpack_from(self._bytes)
        return Beat(since, limit, phase.rstrip(b"\0").decode())


def make_files(folder: Path, local_rank: int) -> Heartbeat:
    """Create, as the launcher, the files of a rank."""
    parent = folder / _PARENT_FILE
    if not parent.exists():  # once: ranks that were started before this one may be reading it
        parent.write_text(str(os.getpid()))
    stacks_file(folder, local_rank).touch()
    path = _beat_file(folder, local_rank)
    path.write_bytes(bytes(_FORMAT.size))
    return Heartbeat(path)


def find_heartbeat(folder: Path, local_rank: int) -> Heartbeat:
    """Return, as the rank, the file to write to."""
    return Heartbeat(_beat_file(folder, local_rank))


def stacks_file(folder: Path, local_rank: int) -> Path:
    """Return where a rank writes its stacks when it gets `STACKS_SIGNAL`."""
    return folder / f"{local_rank}.stacks"


def attach(folder: Path, local_rank: int) -> None:
    """Make this rank end with its launcher, and write the stacks of all threads when it is asked to.

    Both are done by the kernel or a signal handler in C: they work when Python is stuck.
    """
    # faulthandler keeps the file.
    file = stacks_file(folder, local_rank).open("w")
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int((folder / _PARENT_FILE).read_text()):  # it has gone already
        os.kill(os.getpid(), signal.SIGKILL)


def _beat_file(folder: Path, local_rank: int) -> Path:
    return folder / f"{local_rank}.beat"


def describe_hang(beat: Beat, rank: int) -> str:
    """Name the rank, its phase, and how long it has been in it."""
    seconds = time.monotonic() - beat.since
    return (
        f"rank {rank} hangs: {seconds:.0f} s in {beat.phase} (watchdog.{beat.phase}_seconds = {beat.limit:g})"
    )
