"""`streamswav audit --recount`: every shard gone through again, and added up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TextIO

from tqdm import tqdm

from streamswav.commands.audit_checks import Check, count, describe, few, left_by_source, of_sources
from streamswav.commands.audited import AuditedRun
from streamswav.stream.account import LEFT, PartAccount, Range
from streamswav.stream.manifest import Shard
from streamswav.stream.outcomes import Tally
from streamswav.stream.recount import Recount, Unreadable, map_tasks, recount

_SHOWN = 5

LOST = "lost"


@dataclass
class Recounted:
    """What all shards came to, added up shard by shard.

    Attributes:
        tallies: by outcome and source.
        damages: stretches that cannot be parsed.
        damaged_bytes: their bytes.
        end_bytes: bytes of the archives' ends.
        bytes: of all that was gone through, each pass on its own.
        shards: how many were gone through.
        problems: what does not fit, in words.
        unreadable: shards that are not what they were, in words.
        lost: shards that the run lost and that are not recounted, in words.
        lost_bytes: their bytes, by source.
    """

    sources: int
    tallies: dict[str, list[Tally]] = field(default_factory=dict)
    damages: int = 0
    damaged_bytes: int = 0
    end_bytes: int = 0
    bytes: int = 0
    shards: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    lost_bytes: dict[int, int] = field(default_factory=dict)

    def add(self, shard: Shard, result: Sequence[PartAccount] | Unreadable) -> None:
        """Add what one shard came to."""
        if isinstance(result, Unreadable):
            self.unreadable.append(f"{shard.key} {result.reason}")
            return
        self.shards += 1
        for account in result:
            self._add_part(shard, account)

    def lose(self, shard: Shard, turn: int, reason: str) -> None:
        """Note a shard that cannot be recounted, since the run lost it in a pass."""
        self.lost.append(f"{shard.key} in pass {turn + 1} ({reason})")
        self.lost_bytes[shard.source] = self.lost_bytes.get(shard.source, 0) + shard.size

    def total(self, outcome: str) -> Tally:
        """Return the tally of an outcome over all sources."""
        return sum(self.tallies.get(outcome, []), Tally())

    def _add_part(self, shard: Shard, account: PartAccount) -> None:
        for outcome, tally in account.tallies.items():
            by_source = self.tallies.setdefault(outcome, [Tally()] * self.sources)
            by_source[shard.source] += tally
        self.damages += account.damages
        self.damaged_bytes += account.damaged_bytes
        self.end_bytes += account.end_bytes
        self.bytes += shard.size
        self.problem_count += account.problem_count
        if len(self.problems) < _SHOWN:
            self.problems += [f"{shard.key}, pass {account.turn + 1}: {each}" for each in account.problems]


def recount_run(run: AuditedRun, *, workers: int, ranges: TextIO | None = None) -> Recounted:
    """Go through every shard that the position has begun, once for all passes.

    Args:
        run: what is audited.
        workers: processes.
        ranges: where the ranges go, a JSON object a line.

    Raises:
        StorageError: a shard is out of reach; one that is gone or was changed is no error, but noted.
    """
    recounted = Recounted(len(run.position.passes))
    turns: dict[int, list[int]] = {}
    for shard, turn in run.begun:
        turns.setdefault(shard, []).append(turn)

    def tasks() -> Iterator[Recount]:
        for index in sorted(turns):
            shard, claims = run.manifest.shards[index], [run.claims((index, turn)) for turn in turns[index]]
            for each in claims:
                if each.lost:
                    recounted.lose(shard, each.turn, each.lost)
                    _write(ranges, shard, each.turn, [Range(0, shard.size, LOST, each.lost)])
            if kept := tuple(each for each in claims if not each.lost):
                yield Recount(shard, kept, ranges is not None)

    results = map_tasks(recount, tasks(), run.shard_store, workers=workers)
    # On a terminal only: a bar in a log is noise.
    for task, result in tqdm(results, total=len(turns), unit="shard", leave=False, disable=None):
        recounted.add(task.shard, result)
        if not isinstance(result, Unreadable):
            for account in result:
                _write(ranges, task.shard, account.turn, account.ranges)
    return recounted


def _write(file: TextIO | None, shard: Shard, turn: int, ranges: Sequence[Range]) -> None:
    if file is not None:
        named = ({"shard": shard.key, "turn": turn, **asdict(each)} for each in ranges)
        file.writelines(json.dumps(each) + "\n" for each in named)


def check_recount(run: AuditedRun, recounted: Recounted) -> Iterator[Check]:
    """Hold the position against an independent count of every shard."""
    if recounted.unreadable:
        detail = f"{few(recounted.unreadable)}; where they lie now can be said by --stream.urls"
        yield Check("shards", "FAILED", detail)
    else:
        yield Check("shards", "ok", f"{count(recounted.shards, 'shard')} gone through, each as it was listed")
    if recounted.problem_count:
        yield Check(
            "ranges", "FAILED", f"{count(recounted.problem_count, 'misfit')}: {few(recounted.problems)}"
        )
    else:
        detail = f"samples, damages and archive ends tile {recounted.bytes:,} bytes, no hole and no overlap"
        yield Check("ranges", "ok", detail)
    for source in range(len(run.position.passes)):
        yield _check_trained(run, recounted, source)


def recounted_left(run: AuditedRun, recounted: Recounted) -> list[int] | None:
    """Return the samples that are left by the recount, by source; None where shards were lost or not read."""
    if recounted.unreadable or recounted.lost:
        return left_by_source(run)
    return [tally.samples for tally in recounted.tallies.get(LEFT, [Tally()] * len(run.position.passes))]


def _check_trained(run: AuditedRun, recounted: Recounted, source: int) -> Check:
    name = f"trained, recounted{of_sources(run)[source]}"
    counted = run.position.tallies.get("trained", (Tally(),) * len(run.position.passes))[source]
    found = recounted.tallies.get("trained", [Tally()] * len(run.position.passes))[source]
    difference, room = counted - found, recounted.lost_bytes.get(source, 0)
    if difference == Tally():
        return Check(name, "ok", f"{describe(counted)}, in the position and in the shards")
    if room and difference.samples > 0 and 0 < difference.bytes <= room:
        detail = f"{describe(found)} in the shards; {difference.samples:,} more were trained of lost shards"
        return Check(name, "ok", detail)
    detail = f"the position has {describe(counted)}; the shards have {describe(found)}"
    if recounted.unreadable:
        return Check(name, "unknown", f"{detail}, without those that could not be gone through")
    return Check(name, "FAILED", detail)
