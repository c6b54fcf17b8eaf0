"""Checks of where the run is written: its folder, the second copy, its holder, and what is there."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from streamswav.commands.run_folder import refuse_other_grid
from streamswav.doctor.case import Case
from streamswav.doctor.finding import Finding, NotLookedAtError, failed, passed, size, warned
from streamswav.doctor.running import PLANNING_SECONDS, Check, Remedies
from streamswav.errors import (
    CheckpointError,
    ConfigError,
    DeniedError,
    LeaseError,
    NotFoundError,
    PositionError,
    StorageError,
    StreamswavError,
    UnavailableError,
    UnsupportedError,
)
from streamswav.stream.cache import check_cache
from streamswav.stream.store import join, leaving_no_empty_folder, redact
from streamswav.training.feeding import begun_grid
from streamswav.training.lease import LEASE_FILE, LONG_OVER_SECONDS, RENEWALS, parse_holder

WATCH_SECONDS = 2.0
"""Beyond a third of the lease, within which a holder that lives renews it."""

_BODY = b"written by streamswav doctor, to be removed at once"
_ALLOW = (
    "allow s3:PutObject, s3:GetObject and s3:DeleteObject below it and s3:ListBucket on the bucket to the "
    "identity"
)
_OWN = "mount it writable, for the user of the process (fsGroup in a pod)"
_REACH = "see that this machine reaches it, and that it has room; then try again"
_WRITING: Remedies = {
    UnsupportedError: "choose a folder or s3:// prefix",
    UnavailableError: _REACH,
}
_ELSEWHERE = "set back what differs, or choose another run.directory"


def check_writing(case: Case) -> Finding:
    """Write, read and remove an object in the run's folder."""
    return _try_writing(case, case.directory)


def check_copy(case: Case) -> Finding:
    """Do the same in the second place."""
    if not case.trains or not case.config.checkpoint.copy_to:
        raise NotLookedAtError("no second copy is asked for (checkpoint.copy_to)")
    return _try_writing(case, case.config.checkpoint.copy_to)


def _try_writing(case: Case, directory: str) -> Finding:
    try:
        with _scratch(case, directory) as url:
            case.store.write(url, _BODY)
            if case.store.read(url) != _BODY:
                return failed(f"{redact(url)} is not read as it was written", "use another store")
    except DeniedError as error:
        return failed(str(error), _ALLOW if directory.startswith("s3://") else _OWN)
    if case.store.exists(url):
        return failed(f"{redact(url)} was removed, and is still there", "allow s3:DeleteObject below it")
    return passed(f"{redact(directory)} can be written, read and cleared")


def check_conditions(case: Case) -> Finding:
    """See whether the store refuses a write whose condition fails: the run's lease rests upon it."""
    if not case.config.checkpoint.lease_seconds:
        return warned(
            "checkpoint.lease_seconds = 0: two runs may write to one folder",
            "leave checkpoint.lease_seconds at its default",
        )
    case.after("writing")
    with _scratch(case, case.directory) as url:
        if case.store.keeps_conditions(url):
            return passed("the store itself keeps two writers apart (conditional writes, locks)")
    return warned(
        "the store ignores conditions on writes: two runs that begin in the same instant may both hold the "
        "lease until the first of them renews or saves",
        "start a run once, or use a store with conditional writes (If-None-Match), or locks",
    )


@contextlib.contextmanager
def _scratch(case: Case, directory: str) -> Iterator[str]:
    """Give the URL of an object of no name but this check's, and remove it, whatever happens."""
    url = join(directory, f".doctor-{uuid.uuid4().hex}")
    with leaving_no_empty_folder(directory):
        try:
            yield url
        except BaseException:
            with contextlib.suppress(StorageError):
                case.store.delete(url)
            raise
        case.store.delete(url)


def check_holder(case: Case) -> Finding:
    """See whether another process writes to the run: one that lives renews its lease while this looks.

    Rank 0 alone takes the lease; on other nodes it may be the run's own, whose node 0 was faster.
    """
    url = join(case.directory, LEASE_FILE)
    if case.options.node:
        raise NotLookedAtError("node 0 looks, since it is the one that writes")
    content = _read_if_there(case, url)
    holder = parse_holder(content)
    if holder is None:
        return passed("nobody writes to the run")
    if holder.is_dead or time.time() - holder.stamp > LONG_OVER_SECONDS + holder.seconds:
        return passed(f"last held by {holder.name}, which is gone")
    deadline = time.monotonic() + holder.seconds / RENEWALS + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _read_if_there(case, url)
        if now is None:
            return passed(f"{holder.name} has just let go of it")
        if now != content:
            raise LeaseError(f"{redact(url)}: another run writes here ({holder.name})")
    return passed(
        f"held by {holder.name}, who does not renew it: the run takes over within {holder.seconds:.0f} s"
    )


def check_run(case: Case) -> Finding:
    """Look at what the folder holds: nothing, a run that goes on, or one that is done."""
    begun, where = case.begun, redact(case.directory)
    if begun is None:
        return passed(f"{where}: a new run")
    refuse_other_grid(begun_grid(begun), case.config)
    if (newest := case.newest) is None:
        return passed(f"{where}: a run without a checkpoint, which begins again")
    checkpoint, position, passed_over = newest
    state = "done" if position.finished else "to be continued"
    text = f"{where}: {state}, from step {checkpoint.step:,} ({position.trained:,} images)"
    if passed_over:
        remedy = "it goes on from the one before; remove what is damaged"
        return warned(f"{text}; {'; '.join(passed_over)}", remedy)
    return passed(text)


def check_room(case: Case) -> Finding:
    """Hold free room on local disks against checkpoints and cache."""
    config = case.config
    wanted = _checkpoint_bytes(case)
    places = [url for url in (config.run.directory, config.checkpoint.copy_to) if case.trains and _local(url)]
    told, short = [], []
    for url in places:
        free = _free(url)
        told.append(f"{size(free)} free at {url}")
        if wanted and free < (config.checkpoint.keep + 1) * wanted:
            short.append(
                (free < wanted, f"{size(free)} free at {url} for checkpoints of {size(wanted)} each")
            )
    if short:
        remedy = "free room, or put run.directory elsewhere; checkpoint.keep says how many are kept"
        hopeless = any(each for each, _ in short)
        text = "; ".join(text for _, text in short)
        return failed(text, remedy) if hopeless else warned(text, remedy)
    if not told:
        raise NotLookedAtError("no run is written to a local disk")
    return passed(f"{'; '.join(told)}{f', {size(wanted)} a checkpoint' if wanted else ''}")


def check_cache_folder(case: Case) -> Finding:
    """See that something can be kept in the cache, and how much of what is allowed there is room for."""
    section = case.config.storage
    if not section.cache:
        raise NotLookedAtError("no cache is asked for (storage.cache)")
    check_cache(section)
    usage = shutil.disk_usage(section.cache.removeprefix("file://"))
    room = usage.free - section.cache_free_ratio * usage.total
    remedy = "free room, lower storage.cache_bytes, or name a folder on a larger disk"
    if room < section.block_bytes:
        left = f"{size(usage.free)} free of {size(usage.total)}"
        return failed(f"{section.cache}: {left}: no block can be kept", remedy)
    if room + _used(section.cache) < section.cache_bytes:
        text = f"{section.cache}: room for {size(room)}, storage.cache_bytes is {size(section.cache_bytes)}"
        return warned(text, remedy)
    return passed(f"{section.cache}: room for {size(room)}")


def _used(cache: str) -> int:
    root = Path(cache.removeprefix("file://"))
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def _checkpoint_bytes(case: Case) -> int:
    """Bytes of a checkpoint; 0 where nobody knows."""
    try:
        return case.plan.checkpoints.bytes
    except (NotLookedAtError, StreamswavError):
        return 0


def _local(url: str) -> bool:
    return bool(url) and "://" not in url.removeprefix("file://")


def _free(url: str) -> int:
    """Free bytes of the disk that a folder is on, or will be on."""
    path = Path(url.removeprefix("file://")).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _read_if_there(case: Case, url: str) -> bytes | None:
    try:
        return case.store.read(url)
    except NotFoundError:
        return None


def _directory(case: Case) -> list[str]:
    return [case.config.run.directory] if case.trains else []


CHECKS = (
    Check("writing", check_writing, remedies=_WRITING, asks=_directory),
    Check("copy", check_copy, remedies=_WRITING, asks=lambda case: [case.config.checkpoint.copy_to]),
    Check("conditions", check_conditions, remedies=_WRITING, asks=_directory),
    Check(
        "holder",
        check_holder,
        seconds=120,
        remedies={LeaseError: "stop it, wait for its end, or choose another run.directory"},
        asks=_directory,
    ),
    Check(
        "run",
        check_run,
        remedies={PositionError: _ELSEWHERE, CheckpointError: _ELSEWHERE, ConfigError: _ELSEWHERE},
        asks=_directory,
    ),
    Check(
        "cache", check_cache_folder, remedies={ConfigError: "mount a writable disk there, or name another"}
    ),
)
ROOM = Check("room", check_room, seconds=PLANNING_SECONDS)
