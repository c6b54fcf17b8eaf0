"""`streamswav audit --contains`: which checkpoints of a run have seen a sample."""

from __future__ import annotations

import json
import sys
from typing import Any

from streamswav.commands.audited import AuditedRun, open_kept
from streamswav.errors import DataError
from streamswav.stream.account import LEFT
from streamswav.stream.recount import Place, Search, Unreadable, map_tasks, search


def tell_contains(run: AuditedRun, wanted: str, *, workers: int, as_json: bool) -> None:
    """Find a sample, and say for every kept checkpoint what had become of it.

    Args:
        run: the run at its newest checkpoint.
        wanted: KEY, or SHARD:KEY.
        workers: processes that search.
        as_json: print JSON in place of text.

    Raises:
        DataError: the key is in no shard.
    """
    shards, key = _narrow(run, wanted)
    tasks = (Search(run.manifest.shards[index], key) for index in shards)
    found: list[tuple[int, Place]] = []
    unreadable = []
    results = map_tasks(search, tasks, run.shard_store, workers=min(workers, len(shards)))
    for index, (task, result) in zip(shards, results, strict=True):
        if isinstance(result, Unreadable):
            unreadable.append(f"{task.shard.key} {result.reason}")
        else:
            found += ((index, place) for place in result)
    for each in unreadable:
        sys.stderr.write(
            f"streamswav: {each}; it was not searched (--stream.urls says where shards lie now)\n"
        )
    if not found:
        more = f", but {len(unreadable)} could not be searched" if unreadable else ""
        raise DataError(f"{key}: in none of {len(shards)} shards{more}")
    told = [_sightings(run, index, place) for index, place in found]
    if as_json:
        sys.stdout.write(json.dumps({"key": key, "samples": told}, indent=1) + "\n")
    else:
        sys.stdout.write("".join(_sighting_text(key, each) for each in told))


def _narrow(run: AuditedRun, wanted: str) -> tuple[list[int], str]:
    """Shards to search and the key: a shard's own key and a colon ahead of it name the shard."""
    index = {shard.key: number for number, shard in enumerate(run.manifest.shards)}
    shard, colon, _ = wanted.rpartition(":")
    while colon:
        if shard in index:
            return [index[shard]], wanted[len(shard) + 1 :]
        shard, colon, _ = shard.rpartition(":")
    return list(index.values()), wanted


def _sightings(run: AuditedRun, shard: int, place: Place) -> dict[str, Any]:
    ordinal, start, stop = place
    checkpoints = [
        {
            "checkpoint": kept.name,
            "step": kept.checkpoint.step,
            "passes": [
                {"pass": turn + 1, "outcome": outcome}
                for turn in range(kept.position.turns)
                if (outcome := _outcome(kept, shard, turn, ordinal))
            ],
        }
        for kept in open_kept(run)
    ]
    return {
        "shard": run.manifest.shards[shard].key,
        "ordinal": ordinal,
        "start": start,
        "stop": stop,
        "checkpoints": checkpoints,
    }


def _outcome(run: AuditedRun, shard: int, turn: int, ordinal: int) -> str:
    """What had become of a sample in a pass; "" where the pass leaves its shard out."""
    position, manifest, part = run.position, run.manifest, (shard, turn)
    if part not in run.begun:
        covered = position.covered(manifest)
        comes = shard >= covered or shard in manifest.of_turn(
            turn, position.passes, seed=position.seed, covered=covered
        )
        return "not yet" if comes else ""
    claims = run.claims(part)
    if run.is_left(part, ordinal):
        return LEFT if position.finished else "not yet"
    for each in claims.passed:
        if each.ordinal == ordinal:
            return f"{each.outcome} ({each.reason})"
    return f"trained or lost ({claims.lost})" if claims.lost else "trained"


def _sighting_text(key: str, sighting: dict[str, Any]) -> str:
    place = f"sample {sighting['ordinal']:,}, bytes {sighting['start']:,} to {sighting['stop']:,}"
    lines = [f"{key} in {sighting['shard']} ({place})"]
    for each in sighting["checkpoints"]:
        passes = " · ".join(f"pass {one['pass']}: {one['outcome']}" for one in each["passes"])
        lines.append(f"  {each['checkpoint']:<20}  {passes}")
    return "\n".join(lines) + "\n"
