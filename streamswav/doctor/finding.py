"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("pass", "warn", "fail", "skip")


NO_CONFIGURATION = "builds upon configuration, which failed"


class NotLookedAtError(Exception):
    """A check has nothing to look at, or what it builds upon was not there; its text says which."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: of the check.
        text: what was found.
        remedy: what to do about it; every warning and failure has one.
        waits: a failure that goes by itself: whoever waits, or starts again later, finds it gone.
    """

    status: Status
    text: str
    remedy: str = ""
    waits: bool = False

    def __post_init__(self) -> None:
        assert bool(self.remedy) == (self.status in ("warn", "fail")), self


def passed(text: str) -> Finding:
    """All is well."""
    return Finding("pass", text)


def warned(text: str, remedy: str) -> Finding:
    """The run will work, though not as well as it could."""
    return Finding("warn", text, remedy)


def failed(text: str, remedy: str, *, waits: bool = False) -> Finding:
    """The run will not work."""
    return Finding("fail", text, remedy, waits)


def skipped(text: str) -> Finding:
    """There was nothing to look at."""
    return Finding("skip", text)


def size(count: float) -> str:
    """Bytes as limits are given: in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
