"""Loader processes: how they start, how their work reaches the rank in order, and how they end with it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from streamswav.errors import LoaderDiedError, StreamswavError
from streamswav.telemetry.logs import LogSettings, own_log, set_up_logs

PATIENCE_SECONDS = 1.0
GRACE_SECONDS = 2.0

Made = TypeVar("Made")

_DIED = (
    "a loader process was killed, most likely for want of memory; give the rank more memory or /dev/shm, "
    "or lower loader.workers or loader.prefetch"
)


@dataclass(frozen=True)
class Failed:
    """A loader process met an error that no retry mends."""

    error: StreamswavError


@dataclass(frozen=True)
class _Errand(IterableDataset["_Done | Failed"]):
    """One piece of work for a loader process."""

    work: Callable[[], Any]

    def __iter__(self) -> Iterator[_Done | Failed]:
        try:
            yield _Done(self.work())
        except StreamswavError as error:
            yield Failed(error)


@dataclass(frozen=True)
class _Counted(IterableDataset[Made]):
    """Counts, over all loader processes, the items that were made.

    Attributes:
        items: what is made.
        made: how many there were, shared.
    """

    items: IterableDataset[Made]
    made: Synchronized[int]

    @property
    def so_far(self) -> int:
        """How many there were; without the lock, which a process that was killed may hold."""
        return int(self.made.get_obj().value)

    def __iter__(self) -> Iterator[Made]:
        for item in self.items:
            with self.made.get_lock():
                self.made.value += 1
            yield item


@dataclass(frozen=True)
class _Done:
    answer: Any


def run_errand(work: Callable[[], Made], *, workers: int, give_up: Callable[[], bool]) -> Made | None:
    """Do something that may wait long for storage in a loader process, where a run has such.

    Returns:
        What `work` returned; None if `give_up` said so meanwhile.

    Raises:
        StreamswavError: what `work` raised.
    """
    if workers == 0:
        return work()
    with open_loader(_Errand(work), workers=1) as items:
        for item in items:
            if isinstance(item, Failed):
                raise item.error
            if isinstance(item, _Done):
                answer: Made = item.answer
                return answer
            if give_up():
                return None
    raise AssertionError("an errand ends with an answer or an error")


@contextmanager
def open_loader(
    batches: IterableDataset[Made],
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    on_take: Callable[[int], None] = lambda _: None,
) -> Iterator[Iterator[Made | Failed | None]]:
    """Run the loader processes for as long as the context lasts; `workers=0`: the rank does their work.

    Args:
        batches: what they make.
        workers: how many there are.
        prefetch: items that each makes ahead.
        pin_memory: have them in page-locked memory.
        on_take: called before an item is waited for with the number of those that are made.

    Yields:
        An iterator over what they make, in order. It gives None where nothing came for `PATIENCE_SECONDS`,
        so that the rank can look up.
    """
    if workers == 0:
        yield iter(DataLoader(batches, batch_size=None, pin_memory=pin_memory, generator=torch.Generator()))
        return
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    leash, end = context.Pipe(duplex=False)
    counted = _Counted(batches, context.Value("q", 0))
    loader = DataLoader(
        counted,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        timeout=PATIENCE_SECONDS,
        # Its own, or each start of the loader would take a number from the rank's.
        generator=torch.Generator(),
        worker_init_fn=functools.partial(_prepare_worker, leash=leash, logs=own_log().settings),
        # s3fs is not fork-safe, and spawn would import torch again in every worker.
        multiprocessing_context=context,
    )
    with leash, end:
        yield _take(iter(loader), counted, on_take)


def start_fork_server() -> None:
    """Start the process that loader processes are forked from; it imports torch while the rank goes on.

    A signal to the whole process group must not take it: the rank ends its loader processes once it has
    saved. It leaves SIGINT alone by itself; SIGTERM it keeps blocked as it finds it. The tracker of shared
    memory goes first: whoever starts it unblocks SIGTERM, and the fork server would start it in between.
    """
    resource_tracker.ensure_running()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["streamswav.loader"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take(
    items: Iterator[Made], counted: _Counted[Any], on_take: Callable[[int], None]
) -> Iterator[Made | Failed | None]:
    """Give the items as they come, None where none comes, and what became of processes that died."""
    taken = 0
    while True:
        on_take(max(0, counted.so_far - taken))
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            # The DataLoader has no types for these two.
            if str(error).startswith("DataLoader timed out"):
                yield None
            elif str(error).startswith("DataLoader worker"):
                yield Failed(LoaderDiedError(_DIED, _cause(str(error))))
            else:
                raise
        except (ConnectionError, EOFError, FileNotFoundError):
            # The tensors of a process that died are fetched in vain.
            yield Failed(LoaderDiedError(_DIED, "host_oom"))
        else:
            taken += 1
            yield item


def _cause(said: str) -> str:
    """Tell from the DataLoader's words what a process died of."""
    if "Bus error" in said:
        return "shm"
    return "host_oom" if "Killed" in said else "signal" if "by signal" in said else "other"


def _prepare_worker(number: int, *, leash: Connection, logs: LogSettings) -> None:
    """A signal to the process group must not take a worker; the leash does, when the rank lets go of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # First: should what follows fail when the rank is gone, nothing else would end this process.
    threading.Thread(target=_end_with, args=(leash,), name="leash", daemon=True).start()
    set_up_logs(replace(logs, worker=number))
    torch.set_num_threads(1)


def _end_with(leash: Connection) -> None:
    """Wait until the rank's end of the leash is closed, by the rank or by its death; then leave soon.

    The DataLoader's own watch does not see a rank that was killed, as the fork server is the parent; and
    it waits for a worker that is busy, which one that meets no storage is until the deadline.
    """
    connection.wait([leash])
    time.sleep(GRACE_SECONDS)
    os._exit(1)
