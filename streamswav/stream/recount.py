"""Going through shards again, by their headers alone, several at once in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from streamswav.errors import ChangedError, NotFoundError
from streamswav.stream.account import Claims, PartAccount, account_for
from streamswav.stream.manifest import Shard
from streamswav.stream.redaction import find_redacted, newest_version
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage, TarSample, read_samples

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 2


@dataclass(frozen=True)
class Recount:
    """What one shard is to be held against, in each of the passes that have begun."""

    shard: Shard
    claims: tuple[Claims, ...]
    ranges: bool = False


@dataclass(frozen=True)
class Search:
    """A key that is looked for in one shard."""

    shard: Shard
    key: str


@dataclass(frozen=True)
class Unreadable:
    """A shard that is no longer the one of the manifest, or no longer there."""

    reason: str


Place = tuple[int, int, int]
"""Ordinal, first byte and the byte after the last of a sample."""


def recount(store: Store, task: Recount) -> list[PartAccount] | Unreadable:
    """Account for every byte of a shard.

    Raises:
        StorageError: it is out of reach.
    """
    return _reading(
        store, task.shard, lambda items: account_for(task.shard, items, task.claims, ranges=task.ranges)
    )


def search(store: Store, task: Search) -> list[Place] | Unreadable:
    """Return the places of the samples with a key, those that were redacted among them.

    Raises:
        StorageError: the shard is out of reach.
    """

    def find(items: Iterator[TarSample | Damage]) -> list[Place]:
        there = {
            (item.ordinal, item.start, item.stop)
            for item in items
            if isinstance(item, TarSample) and item.key == task.key
        }
        return sorted(there.union(find_redacted(store, task.shard.url, task.key)))

    return _reading(store, task.shard, find)


def map_tasks(
    function: Callable[[Store, Task], Result], tasks: Iterable[Task], store: Store, *, workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with `function(store, task)`, in order; with one worker here, else in processes."""
    if workers <= 1:
        for task in tasks:
            yield task, function(store, task)
        return
    # A server that has imported everything once is forked: threads and clients only start in the forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        for task in tasks:
            waiting.append((task, pool.submit(function, store, task)))
            if len(waiting) > 4 * workers:
                yield _settled(*waiting.popleft())
        while waiting:
            yield _settled(*waiting.popleft())


def _settled(task: Task, future: Future[Result]) -> tuple[Task, Result]:
    return task, future.result()


def _reading(
    store: Store, shard: Shard, consume: Callable[[Iterator[TarSample | Damage]], Result]
) -> Result | Unreadable:
    """Consume what a shard parses to; from the start again where a redaction came in between."""
    version = shard.version
    while True:
        try:
            return consume(_parse(store, shard, version))
        except NotFoundError:
            return Unreadable("is gone")
        except ChangedError:
            try:
                newest = newest_version(store, shard.url, shard.version)
            except NotFoundError:
                return Unreadable("is gone")
            if newest is None or newest == version:
                return Unreadable("was changed")
            version = newest


def _parse(store: Store, shard: Shard, version: str) -> Iterator[TarSample | Damage]:
    # With no room for any member, all are passed over where they lie: nothing is copied.
    yield from read_samples(_blocks(store, shard, version), size=shard.size, limit=0)


def _blocks(store: Store, shard: Shard, version: str) -> Iterator[bytes]:
    """Yield a shard's bytes, of which a few blocks are on their way ahead."""
    length = store.section.block_bytes
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Future[bytes]] = deque()
        for start in range(0, shard.size, length):
            stop = min(start + length, shard.size)
            waiting.append(pool.submit(store.read_range, shard.url, start, stop, version=version))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
