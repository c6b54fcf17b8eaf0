"""Every error of streamswav, as a tree.

    StreamswavError                     exit code 1
    ├── ConfigError                     78  a key, its value, the reason, the nearest valid key
    ├── StorageError
    │   ├── NotFoundError               78  no such bucket, object or folder
    │   ├── DeniedError                 78  wrong key, no permission, an unwritable output
    │   ├── UnsupportedError            78  a server without ranges, an unknown scheme
    │   ├── ChangedError                78  the object is no longer the one in the manifest
    │   └── UnavailableError            75  still failing at the deadline: come back later
    ├── DataError
    │   ├── ManifestError               78  nothing to read, too little to read
    │   ├── DamageError                 (a shard's bytes; the reader turns it into an event)
    │   ├── DecodeError                 (one image; the loader quarantines the sample)
    │   └── BudgetSpentError            78  more was skipped than the budget allows
    ├── PositionError                   78  a position that belongs to another manifest or grid
    ├── CheckpointError                 78  a checkpoint of another model, or none that is whole
    ├── LeaseError                      78  another process writes to the run
    ├── NonFiniteError                  78  loss or gradient is not a number
    ├── LoaderDiedError                 1   a loader process was killed
    ├── HealthError                     78  it learns nothing, and health.stop ends such a run
    ├── PeerError                       75  another rank or node is gone, or never came
    └── DrainedError                    75  stopped by a signal, saved, restart for free

Each carries its evidence as attributes, and its message is one line that a person can act upon.
"""

from __future__ import annotations

from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_RETRY = 75
EXIT_CONFIG = 78


class StreamswavError(Exception):
    """Base of all errors that streamswav raises on purpose."""

    exit_code = EXIT_FAILED

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process borders whole: loader workers hand their errors to the rank."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[StreamswavError], args: tuple[Any, ...], evidence: dict[str, Any]) -> StreamswavError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(evidence)
    return error


class ConfigError(StreamswavError):
    """A configuration that cannot work. `key` is dotted (`swav.epsilon`)."""

    exit_code = EXIT_CONFIG

    def __init__(self, key: str, reason: str, *, value: object = None, nearest: str | None = None) -> None:
        shown = "" if value is None else f" = {value!r}"
        hint = f" (did you mean {nearest}?)" if nearest else ""
        super().__init__(f"{key}{shown}: {reason}{hint}")
        self.key, self.value, self.reason, self.nearest = key, value, reason, nearest


class StorageError(StreamswavError):
    """Reading, writing or listing failed. `url` never carries a query string."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.reason = url, reason


class NotFoundError(StorageError):
    """There is no such bucket, object or folder."""

    exit_code = EXIT_CONFIG


class DeniedError(StorageError):
    """The store refused the identity, or the folder the writer."""

    exit_code = EXIT_CONFIG


class UnsupportedError(StorageError):
    """The location cannot do what is needed (ranges, listing, the scheme itself)."""

    exit_code = EXIT_CONFIG


class ChangedError(StorageError):
    """The object's version or size differs from the manifest's."""

    exit_code = EXIT_CONFIG


class UnavailableError(StorageError):
    """Transient failures went on until the deadline; the job may come back later."""

    exit_code = EXIT_RETRY


class DataError(StreamswavError):
    """Something about the data itself."""


class ManifestError(DataError):
    """The manifest is empty, or too small for what is asked of it."""

    exit_code = EXIT_CONFIG


class DamageError(DataError):
    """A stretch of a shard that cannot be parsed: bytes [start, stop), with a reason label."""

    def __init__(self, reason: str, start: int, stop: int) -> None:
        super().__init__(f"bytes {start} to {stop}: {reason}")
        self.reason, self.start, self.stop = reason, start, stop


class DecodeError(DataError):
    """One image that cannot be used. `reason` is a short label fit for a metric."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BudgetSpentError(DataError):
    """More was skipped than the budget allows; the message shows the evidence."""

    exit_code = EXIT_CONFIG


class PositionError(StreamswavError):
    """A stream position that does not belong to this manifest, grid or format."""

    exit_code = EXIT_CONFIG


class CheckpointError(StreamswavError):
    """A checkpoint that cannot be used here, or none that is whole."""

    exit_code = EXIT_CONFIG


class LeaseError(StreamswavError):
    """Another process writes to the run's folder: begin elsewhere, or leave it to that one."""

    exit_code = EXIT_CONFIG


class NonFiniteError(StreamswavError):
    """The loss or a gradient became infinite or not a number."""

    exit_code = EXIT_CONFIG


class LoaderDiedError(StreamswavError):
    """A loader process was killed; `cause` is a label: host_oom, shm, signal or other."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class HealthError(StreamswavError):
    """The representation is in a bad state, for as long as `health.stop` lets it; everything is saved."""

    exit_code = EXIT_CONFIG


class PeerError(StreamswavError):
    """Another rank or node is gone, or never came; where it ran is told why."""

    exit_code = EXIT_RETRY


class DrainedError(StreamswavError):
    """Stopped by a signal with everything saved: the same command continues."""

    exit_code = EXIT_RETRY
