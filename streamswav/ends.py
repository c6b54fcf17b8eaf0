"""Why a rank ended, in one word, as `worker_exits_total` counts it.

A rank leaves the word itself where it can; of one that was killed the launcher tells it by the signal.
"""

from __future__ import annotations

import signal
from pathlib import Path

from streamswav.errors import (
    EXIT_CONFIG,
    DataError,
    DrainedError,
    LoaderDiedError,
    NonFiniteError,
    PeerError,
    StreamswavError,
    UnavailableError,
)

_CGROUPS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")
_BY_KIND = (
    (DrainedError, "drained"),
    (NonFiniteError, "nonfinite"),
    (UnavailableError, "storage"),
    (PeerError, "peer"),
    (DataError, "data"),
)


def reason_of(error: BaseException) -> str:
    """Return the word for what ends this process."""
    if isinstance(error, SystemExit) and error.__context__ is not None:
        return reason_of(error.__context__)  # a rank that leaves the telling to rank 0
    if isinstance(error, LoaderDiedError):
        return error.cause
    said = _reason_of_text(f"{type(error).__name__}: {error}".lower())
    if said is None and isinstance(error, StreamswavError):
        said = next((word for kind, word in _BY_KIND if isinstance(error, kind)), None)
    if said is None and getattr(error, "exit_code", getattr(error, "code", None)) == EXIT_CONFIG:
        said = "config"
    return said or ("signal" if isinstance(error, KeyboardInterrupt) else "other")


def _reason_of_text(text: str) -> str | None:
    """Tell by the words of torch, which has few types for its errors."""
    if "nccl" in text and ("timeout" in text or "timed out" in text):
        return "nccl_timeout"
    if text.startswith("outofmemoryerror"):
        return "cuda_oom"
    if text.startswith("memoryerror") or "can't allocate memory" in text:
        return "host_oom"
    return "shm" if "shared memory" in text or "/torch_" in text else None


def leave_reason(folder: Path, local_rank: int, reason: str) -> None:
    """Leave the word, as the rank, where the launcher looks."""
    _file(folder, local_rank).write_text(reason)


def reason_of_end(folder: Path, local_rank: int, code: int, *, out_of_memory: bool) -> str:
    """Return the word for a rank that ended, as its launcher.

    Args:
        folder: that both share.
        local_rank: of the rank.
        code: how it ended; negative for a signal.
        out_of_memory: the kernel has killed for want of memory meanwhile.
    """
    file = _file(folder, local_rank)
    if file.exists():
        return file.read_text()
    match code:
        case 0:
            return "ok"
        case _ if code == -signal.SIGBUS:
            return "shm"  # a page of shared memory that there was no room for
        case _ if code == -signal.SIGKILL and out_of_memory:
            return "host_oom"
        case _ if code < 0:
            return "signal"
    return "config" if code == EXIT_CONFIG else "other"


def count_memory_kills() -> int:
    """Return how often the kernel has killed for want of memory: in this container, else on this machine."""
    for path in _CGROUPS:
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return 0


def _file(folder: Path, local_rank: int) -> Path:
    return folder / f"{local_rank}.end"
