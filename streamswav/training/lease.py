"""One writer a run: a lease in the run's folder, with a number that grows from holder to holder.

    <run>/lease.json   {"number": 3, "host": "pod-0", "pid": 1, ..., "renewed": 17, "seconds": 60.0}

Whoever holds it writes it again every third of its seconds, and soon again where that failed. A newcomer
takes it over once it has lain unchanged for as long as it lasts, by the newcomer's own clock, or at once
where the holder is known to be dead: a process of this machine that is gone. It refuses to begin while the
holder renews. A holder that was stopped, cut off or thought dead finds another's name in it before anything
becomes the run's newest checkpoint, and ends. The number of the holder is in every checkpoint.

What the lease rests upon is `Store.swap`: where the store has no conditional writes (rclone's S3 server, some
network file systems), two that begin in the same instant may both believe to hold it until the first of them
renews or saves.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from streamswav.errors import ChangedError, LeaseError, NotFoundError, StorageError
from streamswav.stream.store import Store, join, redact

LEASE_FILE = "lease.json"
RENEWALS = 3
LONG_OVER_SECONDS = 600.0
LOOK_SECONDS = 0.5

_KINDS: dict[object, Callable[[object], object]] = {"int": int, "float": float, "str": str}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Holder:
    """Who writes to a run.

    Attributes:
        number: grows with every holder.
        token: this holder's alone.
        host: name of its machine or pod.
        pid: its process, in the numbering of `world`.
        began: start time of the process, in ticks since the machine's.
        world: boot and pid namespace that the process belongs to.
        since: when it took the lease, for people.
        seconds: how long the lease lasts after it was renewed.
        renewed: how often it was.
        stamp: when it was renewed, in seconds since 1970 by the holder's clock.
    """

    number: int
    token: str
    host: str
    pid: int
    began: int
    world: str
    since: str
    seconds: float
    renewed: int
    stamp: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host}, process {self.pid}, since {self.since}"

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is gone; False where that cannot be known."""
        return (self.host, self.world) == (socket.gethostname(), _world()) and _began(self.pid) != self.began

    def to_bytes(self) -> bytes:
        """Return its JSON."""
        return json.dumps(asdict(self)).encode()


class Lease:
    """The right to write to a run; of several ranks, rank 0 holds it.

    Args:
        directory: of the run.
        store: where that lies.
        seconds: how long the lease lasts without being renewed; 0 turns it off.
        tell: hears of waiting and taking over, in words.
    """

    def __init__(
        self, directory: str, store: Store, *, seconds: float, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.url = join(directory, LEASE_FILE)
        self._seconds, self._tell = seconds, tell
        # A renewal that takes longer than the lease lasts is of no use.
        patience = max(1.0, min(seconds / RENEWALS, store.section.deadline_seconds))
        self._store = store
        self._hurried = Store(store.section.model_copy(update={"deadline_seconds": patience}))
        self._held: tuple[Holder, str] | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: LeaseError | None = None

    @property
    def number(self) -> int:
        """The holder's number; 0 without a lease."""
        return self._held[0].number if self._held else 0

    def acquire(self, *, above: int = 0) -> None:
        """Take the lease, and renew it from now on; waits where it may be another's that is dead.

        Args:
            above: the highest number known from the run's checkpoints.

        Raises:
            LeaseError: another holds it and lives.
            StorageError: the run's folder is out of reach.
        """
        if not self._seconds:
            return
        while self._held is None:
            before, version = self._await_free()
            holder = _myself(max(above, before.number if before else 0) + 1, self._seconds)
            with suppress(ChangedError):  # another was faster: who is it?
                self._held = holder, self._store.swap(self.url, holder.to_bytes(), version=version)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Make sure that this process still is the run's writer.

        Raises:
            LeaseError: another has taken over, or the lease was removed.
            StorageError: it cannot be found out now.
        """
        with self._lock:
            if self._lost:
                raise self._lost
            if self._held is None:
                return
            held = self._held[0]
            found = parse_holder(self._read()[0])
            if found is None or found.token != held.token:
                self._lost = _lost(self.url, found)
                raise self._lost

    def release(self) -> None:
        """Give it back, if it is still this process's."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
        with suppress(StorageError, LeaseError):
            self.check()
            if self._held:
                self._hurried.delete(self.url)
        self._held = None

    def _await_free(self) -> tuple[Holder | None, str | None]:
        """Wait until nobody holds it; return who did last, and the version to replace."""
        content, version = self._read(self._store)
        holder = parse_holder(content)
        if holder is None or holder.is_dead:
            return holder, version
        if time.time() - holder.stamp > LONG_OVER_SECONDS + holder.seconds:
            return holder, version
        self._tell(
            f"{redact(self.url)}: held by {holder.name}, who is not known to be dead; waiting up to "
            f"{holder.seconds:.0f} s for it to be renewed"
        )
        began, missing = time.monotonic(), False
        while time.monotonic() < began + holder.seconds:
            time.sleep(min(LOOK_SECONDS, holder.seconds / 10))
            now, changed = self._read(self._store)
            other = parse_holder(now)
            if other is None and missing:
                return holder, changed
            missing = other is None  # some servers have none for a moment while it is being replaced
            if other is None:
                continue
            if now != content:
                raise LeaseError(
                    f"{redact(self.url)}: another run writes here ({other.name}); stop it, or choose "
                    "another run.directory"
                )
            if other.is_dead:
                break
        self._tell(f"{redact(self.url)}: taken over from {holder.name}, who has not renewed it")
        return holder, version

    def _read(self, store: Store | None = None) -> tuple[bytes | None, str | None]:
        try:
            return (store or self._hurried).read_version(self.url)
        except NotFoundError:
            return None, None

    def _renew(self) -> None:
        pause = self._seconds / RENEWALS
        wait = pause
        while not self._over.wait(wait):
            # One that failed has cost a pause already; another of full length may be more than the lease has.
            wait = pause / RENEWALS
            with self._lock:
                assert self._held is not None
                held, version = self._held
                renewed = replace(held, renewed=held.renewed + 1, stamp=time.time())
                try:
                    self._held = renewed, self._hurried.swap(self.url, renewed.to_bytes(), version=version)
                except ChangedError:
                    if self._is_anothers(held):
                        return
                except StorageError:
                    continue  # what matters is whether another has it by the time of the next save
            wait = pause

    def _is_anothers(self, held: Holder) -> bool:
        """Find out after a failed renewal; an answer that was lost may have left what is ours."""
        try:
            content, version = self._read()
        except StorageError:
            return False
        found = parse_holder(content)
        if found is not None and version is not None and found.token == held.token:
            self._held = found, version
            return False
        self._lost = _lost(self.url, found)
        return True


def _lost(url: str, found: Holder | None) -> LeaseError:
    if found is None:
        return LeaseError(f"{redact(url)}: the lease was removed; another may write to this run: ending")
    return LeaseError(
        f"{redact(url)}: {found.name} has taken this run over while this process was thought dead: ending, "
        "nothing of the other's was touched"
    )


def parse_holder(content: bytes | None) -> Holder | None:
    """Read who holds a lease; what is no lease is nobody's."""
    try:
        values = json.loads(content) if content else {}
        # A later version may say more of itself, and holds the lease all the same.
        known: dict[str, Any] = {each.name: _KINDS[each.type](values[each.name]) for each in fields(Holder)}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return Holder(**known)


def _myself(number: int, seconds: float) -> Holder:
    pid = os.getpid()
    now = time.time()
    return Holder(
        number=number,
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        began=_began(pid) or 0,
        world=_world(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        seconds=seconds,
        renewed=0,
        stamp=now,
    )


def _began(pid: int) -> int | None:
    """Start time of a process of this machine; None where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _world() -> str:
    """Which processes a number is comparable with: those of one boot and one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex
