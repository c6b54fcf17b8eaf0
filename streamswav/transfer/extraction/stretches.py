"""Stretches: the parts of shards in which features are computed, and who computes which.

A stretch is n consecutive samples of a shard, those of the ordinals [i * n, (i + 1) * n). It follows from
the shard alone, never from workers or ranks, and so does all that is computed of it; who does so is free.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streamswav.stream.pieces import Piece
from streamswav.stream.plan import split_pieces


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """Part `number`, from 0, of a shard (index in the manifest)."""

    shard: int
    number: int


@dataclass(frozen=True, slots=True)
class End:
    """Where a stretch ends: the byte at which the next one begins, and whether it is the shard's last."""

    stop: int
    last: bool


@dataclass(frozen=True, slots=True)
class Task:
    """What one process computes of a shard: of the stretches that are not done every n-th.

    Attributes:
        shard: index in the manifest.
        last: number of the last stretch; None where nobody has read as far.
        stop: samples from this ordinal on are left out; None: none are.
        done: numbers of the stretches that are done.
        starts: first byte of stretches, by number, as far as it is known.
        stride: every how manieth stretch is meant.
        residue: which of them.
    """

    shard: int
    last: int | None = None
    stop: int | None = None
    done: frozenset[int] = frozenset()
    starts: Mapping[int, int] = field(default_factory=lambda: {0: 0})
    stride: int = 1
    residue: int = 0

    def wants(self, number: int) -> bool:
        """Tell whether a stretch is to be computed."""
        return number % self.stride == self.residue and number not in self.done

    def wants_from(self, number: int) -> bool:
        """Tell whether any stretch from this one on is to be computed, as far as is known."""
        return self.last is None or any(self.wants(each) for each in range(number, self.last + 1))

    def begin(self) -> tuple[int, int]:
        """Return the stretch to begin reading at, and its first byte."""
        first = self.residue
        while not self.wants(first):
            first += self.stride
        number = max(each for each in self.starts if each <= first)
        return number, self.starts[number]


def list_tasks(ends: Mapping[Stretch, End], *, stops: Sequence[int | None]) -> list[Task]:
    """Return a task for every shard that is not done.

    Args:
        ends: of the stretches that are done.
        stops: of each shard, the ordinal from which on samples are left out; None: none are.
    """
    done: dict[int, dict[int, End]] = {}
    for stretch, end in ends.items():
        done.setdefault(stretch.shard, {})[stretch.number] = end
    tasks = (_task(shard, done.get(shard, {}), stop) for shard, stop in enumerate(stops) if stop != 0)
    return [task for task in tasks if task.wants_from(0)]


def _task(shard: int, done: Mapping[int, End], stop: int | None) -> Task:
    last = next((number for number, end in done.items() if end.last), None)
    starts = {0: 0, **{number + 1: end.stop for number, end in done.items() if not end.last}}
    return Task(shard, last, stop, frozenset(done), starts)


def share_out(tasks: Sequence[Task], sizes: Sequence[int], *, processes: int) -> list[tuple[Task, ...]]:
    """Share tasks among processes, by bytes; where they are few, several share a shard.

    Args:
        tasks: of different shards.
        sizes: bytes of the manifest's shards.
        processes: their number, over all ranks.

    Returns:
        The tasks of each process, by shard.
    """
    of_shard = {task.shard: task for task in tasks}
    # A piece's stride counts samples for those who train; here it counts stretches.
    pieces, left = split_pieces(
        [Piece(task.shard, 0, task.begin()[1]) for task in tasks], sizes, lanes=processes
    )
    shares: list[list[Task]] = [[] for _ in range(processes)]
    loads = [(0, process) for process in range(processes)]
    for size, piece in sorted(zip(left, pieces, strict=True), key=_largest_first):
        load, process = loads[0]
        heapq.heapreplace(loads, (load + size, process))
        task = replace(of_shard[piece.shard], stride=piece.stride, residue=piece.residue)
        if task.wants_from(0):
            shares[process].append(task)
    return [tuple(sorted(share, key=_shard)) for share in shares]


def first_of_each(limit: int | None, shards: int) -> list[int | None]:
    """Say how many of every shard's first samples make up about `limit`, as evenly as it allows."""
    if limit is None:
        return [None] * shards
    return [(index + 1) * limit // shards - index * limit // shards for index in range(shards)]


def _largest_first(pair: tuple[int, Piece]) -> tuple[int, int, int]:
    size, piece = pair
    return (-size, piece.shard, piece.residue)


def _shard(task: Task) -> int:
    return task.shard
