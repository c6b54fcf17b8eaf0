"""The checks of `streamswav audit`: a position against its side lists, its manifest and its shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from streamswav.commands.audited import AuditedRun
from streamswav.commands.run_folder import LEFT_FILE
from streamswav.errors import NotFoundError
from streamswav.stream.outcomes import LOST_REASONS, OUTCOMES, Tally, tally_one
from streamswav.stream.pieces import Piece
from streamswav.stream.store import join

PASSED_OVER = tuple(outcome for outcome in OUTCOMES if outcome != "trained")

_SHOWN = 5

Verdict = Literal["ok", "FAILED", "unknown"]

_SMALLEST_SAMPLE = 1024  # bytes: a header and a block of data


@dataclass(frozen=True)
class Check:
    """One thing that must fit, and whether it does."""

    name: str
    verdict: Verdict
    detail: str


def check_books(run: AuditedRun) -> Iterator[Check]:
    """Hold the checkpoint against what lies beside it; no shard is read."""
    tallies, reasons = run.lists.add_up(run.is_left)
    yield _check_entries(run)
    for outcome in PASSED_OVER:
        yield from _check_list(run, outcome, tallies.get(outcome, ()))
    yield _check_reasons(run, reasons)
    yield _check_damages(run)
    if run.checkpoint.images != run.position.trained:
        detail = f"checkpoint.json has {run.checkpoint.images:,}, position.json {run.position.trained:,}"
        yield Check("images of the checkpoint", "FAILED", detail)
    else:
        yield Check("images of the checkpoint", "ok", f"{run.position.trained:,} in both of its files")
    yield from (_check_bytes(run, source) for source in range(len(run.position.passes)))


def check_counts(run: AuditedRun, left: Sequence[int] | None) -> Check:
    """Hold all samples against the producers' counts.

    Args:
        run: what is audited.
        left: samples that are left, by source, where they were counted.
    """
    name, position = "known counts", run.position
    if why := _counts_unknown(run):
        return Check(name, "unknown", why)
    if left is None:
        return Check(name, "unknown", "what is left is not counted; --recount counts it")
    turns = position.turn if position.finished else position.turn + 1
    even = len({*position.passes}) == 1  # they may have been lowered since
    passes = (turns,) * len(position.passes) if even else position.passes
    expected = run.manifest.total(passes)
    assert expected is not None
    found = sum(position.total(outcome).samples for outcome in OUTCOMES) + sum(left)
    detail = f"{found:,} samples met, {expected:,} known from _stats.json"
    difference, damages = expected - found, len(position.damages)
    swallowed = sum(each.stop - each.start for each in position.damages) // _SMALLEST_SAMPLE
    if difference == 0:
        return Check(name, "ok", detail)
    # A damage may swallow samples, or cut one of several members in two.
    if damages and -damages <= difference <= damages + swallowed:
        return Check(
            name, "ok", f"{detail}; the difference of {difference:,} lies in {count(damages, 'damage')}"
        )
    return Check(name, "FAILED", f"{detail}, and no damage explains the difference of {difference:,}")


def _counts_unknown(run: AuditedRun) -> str:
    """Say why the producers' counts say nothing of this position; "" where they do."""
    position, manifest = run.position, run.manifest
    if any(count is None for count in manifest.counts):
        return "the shards came without counts (_stats.json)"
    if position.covered(manifest) < len(manifest.shards):
        return "shards have joined that the checkpoint does not know yet"
    if not position.finished and len({*position.passes}) > 1:
        return "in mid-run the sources have been read unevenly"
    return ""


def read_left(run: AuditedRun) -> tuple[Tally | None, Check | None]:
    """Read the list of a finished run's left-over, and hold it against the position.

    Returns:
        The tally of what is left, where the list gives it, and the check, where there is a list.
    """
    if not (run.position.finished and run.newest):
        return None, None
    try:
        lines = run.store.read(join(run.url, LEFT_FILE)).splitlines()
    except NotFoundError:
        return None, None
    index = {shard.key: number for number, shard in enumerate(run.manifest.shards)}
    tally, listed = Tally(), set[tuple[int, int, int]]()
    try:
        for entry in map(json.loads, lines):
            shard = index[entry["shard"]]
            listed.add((shard, entry["turn"], entry["ordinal"]))
            tally += tally_one(
                run.manifest.shards[shard].digest,
                *(int(entry[name] or 0) for name in ("turn", "ordinal", "start", "stop")),
            )
    except (ValueError, KeyError, TypeError):
        return None, Check(LEFT_FILE, "FAILED", "cannot be understood; --left lists the left-over anew")
    named = {(each.shard, each.turn, n) for each in run.position.carried for n in each.named() or ()}
    if listed != named or tally.samples != len(named):
        detail = (
            f"it lists {tally.samples:,} samples, {len(listed - named):,} of them not the {len(named):,} left"
        )
        return None, Check(LEFT_FILE, "FAILED", detail)
    return tally, Check(LEFT_FILE, "ok", f"it lists {count(len(named), 'sample')}, those that are left")


def describe(tally: Tally) -> str:
    """Put a tally in words."""
    return f"{count(tally.samples, 'sample')}, {tally.bytes:,} bytes, digest {tally.digest:016x}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, of which it may be one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _check_entries(run: AuditedRun) -> Check:
    if run.lists.problems:
        return Check("side lists", "FAILED", few(run.lists.problems))
    return Check("side lists", "ok", "every entry is understood, no sample has two")


def _check_list(run: AuditedRun, outcome: str, listed: Sequence[Tally]) -> Iterator[Check]:
    """Compare by source; where there is nothing on both sides, there is nothing to say."""
    counted = run.position.tallies.get(outcome, ())
    for source, name in enumerate(of_sources(run)):
        here = counted[source] if counted else Tally()
        there = listed[source] if listed else Tally()
        if here == there and here.samples:
            yield Check(f"{outcome}{name}", "ok", f"{describe(here)}, in the position and in the lists")
        elif here != there:
            detail = f"the position has {describe(here)}; the lists have {describe(there)}"
            yield Check(f"{outcome}{name}", "FAILED", detail)


def _check_reasons(run: AuditedRun, listed: Mapping[str, int]) -> Check:
    counted = run.position.reasons
    differ = sorted(name for name in {*counted, *listed} if counted.get(name, 0) != listed.get(name, 0))
    if not differ:
        return Check(
            "reasons", "ok", f"{count(sum(counted.values()), 'sample')} passed over, by reason as listed"
        )
    told = (f"{name}: position {counted.get(name, 0):,}, lists {listed.get(name, 0):,}" for name in differ)
    return Check("reasons", "FAILED", few(list(told)))


def _check_damages(run: AuditedRun) -> Check:
    damages = run.position.damages
    missing = [
        f"{run.manifest.shards[each.shard].key}[{each.start}:{each.stop}] {each.reason}"
        for each in damages
        if (each.turn, each.shard, each.start, each.stop, each.reason) not in run.lists.damages
    ]
    if missing:
        return Check("damages", "FAILED", f"not in the lists: {few(missing)}")
    return Check("damages", "ok", f"{count(len(damages), 'damage')}, each of them listed")


def _check_bytes(run: AuditedRun, source: int) -> Check:
    """What has an outcome and what was not touched must find room in the shards."""
    shards = run.manifest.shards
    room = sum(shards[shard].size for shard, _ in run.begun if shards[shard].source == source)
    used = sum(run.position.tallies[outcome][source].bytes for outcome in run.position.tallies)
    used += sum(
        each.stop - each.start
        for each in run.position.damages
        if each.reason not in LOST_REASONS and shards[each.shard].source == source
    )
    untouched = sum(
        shards[shard].size
        for (shard, _), pieces in run.left.items()
        if shards[shard].source == source and _untouched(pieces)
    )
    name, detail = f"bytes{of_sources(run)[source]}", f"{used:,} accounted for, {untouched:,} not touched"
    if used + untouched > room:
        return Check(name, "FAILED", f"{detail}: more than the {room:,} of the shards")
    return Check(name, "ok", f"{detail}, within the {room:,} of the shards")


def _untouched(pieces: Sequence[Piece]) -> bool:
    whole = (Fraction(1, piece.stride) for piece in pieces if not (piece.ordinal or piece.done))
    return sum(whole) == 1


def left_by_source(run: AuditedRun) -> list[int] | None:
    """Return the samples that a finished run left over, by source; None in mid-run."""
    if not run.position.finished:
        return None
    counts = [0] * len(run.position.passes)
    for piece in run.position.carried:
        counts[run.manifest.shards[piece.shard].source] += len(piece.named() or ())
    return counts


def of_sources(run: AuditedRun) -> list[str]:
    """Return what names a source in a row; nothing where there is but one."""
    if len(run.position.passes) == 1:
        return [""]
    return [f" of {source}" for source in run.sources]


def few(texts: Sequence[str]) -> str:
    """Return the first of these, and how many more there are."""
    more = f"; and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
