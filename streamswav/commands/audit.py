"""`streamswav audit`: what became of every sample of a run, and whether it adds up."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from streamswav.commands.audit_checks import Check, check_books, check_counts, left_by_source, read_left
from streamswav.commands.audit_contains import tell_contains
from streamswav.commands.audit_recount import Recounted, check_recount, recount_run, recounted_left
from streamswav.commands.audited import AuditedRun, open_run
from streamswav.config import Config
from streamswav.errors import ConfigError, DataError
from streamswav.stream.account import LEFT, LeftSample, list_left
from streamswav.stream.outcomes import LOST_REASONS, OUTCOMES, Tally
from streamswav.stream.position import lost_bytes
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import redact

_SIGNS = {"ok": "ok     ", "FAILED": "FAILED ", "unknown": "unknown"}

HELP = """\
Without --recount only the run's own books are compared: its newest whole checkpoint, the side lists of what
was passed over (RUN/excluded, RUN/filtered, RUN/quarantined) and the manifest. Seconds, no shard is read.
With --recount every shard that the run has begun is read again, by its headers, and every byte of it gets
one outcome: trained, left, passed over with a reason, damaged, or the archive's end. Hours at scale: it
reads what the run has read.

The run may be finished, killed or going on: it is audited as of its checkpoint. Nothing is written to it.

How storage is reached can be set by --storage.KEY, as for pretrain. Shards that have moved since, or whose
URLs were signed, are found by --stream.urls.

exit codes: 0 it balances · 1 it does not, or a key is in no shard (the message says what) · 75 storage is out
of reach for now · 78 no run there, access denied, or a wrong argument
"""


@dataclass(frozen=True)
class Row:
    """A line of the table; what is None is not known. `source` is empty for all sources together."""

    outcome: str
    source: str
    samples: int | None
    bytes: int | None
    digest: str | None


@dataclass(frozen=True)
class Report:
    """What was found: rows, and the checks that were made of them."""

    run: AuditedRun
    rows: Sequence[Row]
    checks: Sequence[Check]
    recounted: Recounted | None

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.verdict == "FAILED"]


def add_audit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_audit`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HELP
    parser.add_argument("run_folder", metavar="RUN", help="the run's folder, local or s3://")
    parser.add_argument(
        "--checkpoint", metavar="URL", help="another than the newest whole one: its name (step-...) or URL"
    )
    parser.add_argument("--recount", action="store_true", help="read every shard again and count for itself")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read shards (default: one a core)"
    )
    parser.add_argument(
        "--ranges",
        metavar="FILE",
        help="with --recount: write the outcome of every byte range, as JSON lines",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--contains",
        metavar="KEY",
        help="only say which kept checkpoints have seen this sample; SHARD:KEY reads but one shard",
    )
    modes.add_argument(
        "--left",
        action="store_true",
        help="only list what is left, SHARD:KEY a line; in mid-run that is all that was not read yet",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def run_audit(arguments: argparse.Namespace, *, given: Config) -> None:
    """Audit a run and print what was found.

    Args:
        arguments: parsed by a parser that `add_arguments` prepared.
        given: how storage is reached, and where the shards lie if no longer where they did.

    Raises:
        DataError: it does not balance, or the key is in no shard.
        CheckpointError: there is no run.
        StreamswavError: as the store deserves.
    """
    if arguments.ranges and not arguments.recount:
        raise ConfigError("--ranges", "only a recount knows them: give --recount too")
    workers = arguments.workers or len(os.sched_getaffinity(0))
    run = open_run(arguments.run_folder.rstrip("/"), given, checkpoint=arguments.checkpoint)
    if arguments.contains:
        tell_contains(run, arguments.contains, workers=workers, as_json=arguments.json)
    elif arguments.left:
        _tell_left(run, as_json=arguments.json)
    else:
        report = _audit(run, arguments, workers)
        sys.stdout.write(_to_json(report) if arguments.json else _to_text(report))
        if report.failed:
            raise DataError(
                f"{redact(run.url)}: {run.name} does not balance: {'; '.join(report.failed)} (see above)"
            )


def _audit(run: AuditedRun, arguments: argparse.Namespace, workers: int) -> Report:
    checks, recounted = list(check_books(run)), None
    listed, check = read_left(run)
    checks += [check] if check else []
    if arguments.recount:
        recounted = _recount(run, workers, arguments.ranges)
        checks += check_recount(run, recounted)
    left = recounted_left(run, recounted) if recounted else left_by_source(run)
    checks.append(check_counts(run, left))
    return Report(run, list(_rows(run, recounted, listed, left)), checks, recounted)


def _recount(run: AuditedRun, workers: int, ranges: str | None) -> Recounted:
    if ranges is None:
        return recount_run(run, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranges.jsonl"
        with path.open("w") as file:
            recounted = recount_run(run, workers=workers, ranges=file)
        run.store.upload(path, ranges)
    return recounted


def _rows(
    run: AuditedRun, recounted: Recounted | None, listed: Tally | None, left: Sequence[int] | None
) -> Iterator[Row]:
    """Yield what the position says, and of the rest what is known."""
    for outcome in OUTCOMES:
        yield from _row_by_source(run, outcome, run.position.tallies.get(outcome, ()))
    if recounted and not (recounted.unreadable or recounted.lost):
        left_by_source = recounted.tallies.get(LEFT, ())
        yield from _row_by_source(run, LEFT, left_by_source)
        both = run.position.total("trained") + recounted.total(LEFT)
        yield _row("trained + left", both)
    elif listed is not None:
        yield _row(LEFT, listed)
        yield _row("trained + left", run.position.total("trained") + listed)
    else:
        yield Row(LEFT, "", sum(left) if left is not None else None, None, None)
    yield from _rows_of_no_sample(run, recounted)


def _rows_of_no_sample(run: AuditedRun, recounted: Recounted | None) -> Iterator[Row]:
    """Yield bytes that are no sample's; damages that the run has yet to meet are known to a recount alone."""
    met = [each for each in run.position.damages if each.reason not in LOST_REASONS]
    met_bytes = sum(each.stop - each.start for each in met)
    whole = recounted is not None and not (recounted.unreadable or recounted.lost)
    yield Row("damaged", "", None, recounted.damaged_bytes if recounted and whole else met_bytes, None)
    if lost_bytes(run.position.damages):
        yield Row("lost with their shards", "", None, lost_bytes(run.position.damages), None)
    if recounted and recounted.lost:
        difference = run.position.total("trained") - recounted.total("trained")
        yield _row("trained, of lost shards", difference)
    yield Row("archive ends", "", None, recounted.end_bytes if recounted else None, None)


def _row_by_source(run: AuditedRun, outcome: str, by_source: Sequence[Tally]) -> Iterator[Row]:
    yield _row(outcome, sum(by_source, Tally()))
    if len(by_source) > 1:
        for source, tally in zip(run.sources, by_source, strict=True):
            yield _row(outcome, tally, source)


def _row(outcome: str, tally: Tally, source: str = "") -> Row:
    return Row(outcome, source, tally.samples, tally.bytes, f"{tally.digest:016x}")


def _to_text(report: Report) -> str:
    run, position = report.run, report.run.position
    turn = "finished" if position.finished else f"in pass {position.turn + 1} of {position.turns}"
    size = f"{len(run.manifest.shards):,} shards, {run.manifest.size:,} bytes"
    lines = [
        f"run         {redact(run.url)}",
        f"checkpoint  {run.name}, step {run.checkpoint.step:,}, {turn}",
        f"manifest    {run.manifest.digest}, {size}",
        "",
        f"{'outcome':<26}{'samples':>16}{'bytes':>22}  digest",
    ]
    for row in report.rows:
        name = f"  of {row.source}" if row.source else row.outcome
        digest = f"  {row.digest or ''}"
        lines.append(f"{name:<26}{_number(row.samples):>16}{_number(row.bytes):>22}{digest}".rstrip())
    if position.reasons:
        told = " · ".join(f"{reason} {count:,}" for reason, count in sorted(position.reasons.items()))
        lines += ["", f"passed over, by reason: {told}"]
    lines += ["", *(f"{_SIGNS[each.verdict]}  {each.name}: {each.detail}" for each in report.checks), ""]
    lost = report.recounted.lost if report.recounted else []
    lines += [f"not recounted, since the run lost it: {each}" for each in lost]
    unknown = sum(check.verdict == "unknown" for check in report.checks)
    if report.failed:
        lines.append(f"It does NOT balance: {len(report.failed)} of {len(report.checks)} checks failed.")
    else:
        more = "" if report.recounted else "; --recount counts the shards as well"
        known = f"{len(report.checks) - unknown} checks hold" + (f", {unknown} unknown" if unknown else "")
        lines.append(f"It balances: {known}{more}.")
    return "\n".join(lines) + "\n"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _to_json(report: Report) -> str:
    run, position = report.run, report.run.position
    values = {
        "run": redact(run.url),
        "checkpoint": run.checkpoint.url,
        "step": run.checkpoint.step,
        "turn": position.turn,
        "passes": list(position.passes),
        "finished": position.finished,
        "manifest": run.manifest.digest,
        "rows": [asdict(row) for row in report.rows],
        "reasons": dict(position.reasons),
        "damages": len(position.damages),
        "checks": [{**asdict(check), "verdict": check.verdict.lower()} for check in report.checks],
        "recounted": report.recounted is not None,
        "not_recounted": report.recounted.lost if report.recounted else [],
        "balanced": not report.failed,
    }
    return json.dumps(values, indent=1) + "\n"


def _tell_left(run: AuditedRun, *, as_json: bool) -> None:
    reader = ShardReader(run.manifest, run.shard_store.section, read_ahead=2)
    for each in list_left(run.position.left(run.manifest), reader.open):
        sys.stdout.write(_left_line(run, each, as_json=as_json) + "\n")


def _left_line(run: AuditedRun, each: LeftSample, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(each.to_json(run.manifest))
    shard = run.manifest.shards[each.shard].key
    return (
        f"{shard}:{each.key}" if each.stop is not None else f"{shard}, sample {each.ordinal} (not to be read)"
    )
