"""`streamswav verdict`: what the health of a run's representation comes to, past or present."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from streamswav.config import Config
from streamswav.errors import EXIT_FAILED, ConfigError, HealthError, NotFoundError
from streamswav.stream.store import Store, join, redact
from streamswav.telemetry.verdict import BAD
from streamswav.training.history import HISTORY_FOLDER, read_history

HELP = """\
Reads RUN/health/, which a pretraining run writes with its checkpoints: the run may be finished, stopped or
going on, and is judged as of its last checkpoint. Nothing is written. ops/health.md says what figures mean.

How storage is reached can be set by --storage.KEY, as for pretrain.

exit codes: 0 healthy or warming up · 1 a bad verdict · 75 storage is out of reach for now · 78 no run there,
or one without a history (the message says what is missing)
"""

_COLUMNS = {
    "step": ("step", "{:,.0f}"),
    "images": ("images", "{:,.0f}"),
    "loss": ("loss", "{:.3f}"),
    "prototype_usage_ratio": ("used", "{:.0%}"),
    "prototypes_unique_ratio": ("unique", "{:.0%}"),
    "assignment_information_ratio": ("information", "{:.1%}"),
    "crop_agreement_ratio": ("agreement", "{:.0%}"),
    "embedding_std_ratio": ("spread", "{:.2f}"),
    "embedding_rankme": ("RankMe", "{:.1f}"),
    "rankme": ("trunk", "{:.1f}"),
    "queue_staleness_ratio": ("staleness", "{:.2f}"),
}


def add_verdict_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_verdict`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HELP
    parser.add_argument("run_folder", metavar="RUN", help="the run's folder, local or s3://")
    parser.add_argument("--lines", type=int, default=10, help="of the history that are shown (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_verdict(args: argparse.Namespace, *, given: Config) -> None:
    """Print the verdict of a run.

    Args:
        args: parsed by a parser that `add_verdict_arguments` prepared.
        given: its `storage` tells how the run is reached.

    Raises:
        HealthError: the verdict is a bad one; it was printed.
        NotFoundError: there is no run, or it has no history.
        StorageError: it is out of reach.
    """
    if args.lines < 1:
        raise ConfigError("--lines", "must be at least 1", value=args.lines)
    store, folder = Store(given.storage), args.run_folder.rstrip("/")
    history = read_history(store, folder, most=args.lines)
    if not history:
        raise _what_is_missing(store, folder)
    report = to_report(redact(folder), history)
    text = json.dumps(report, indent=1) if args.json else to_text(report)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    if report["verdict"] in BAD:
        error = HealthError(f"{report['run']}: {report['verdict']} since step {report['since_step']:,}")
        error.exit_code = EXIT_FAILED
        raise error


def to_report(run: str, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is printed as JSON, of lines of which the last one holds."""
    last = history[-1]
    verdict = last["verdict"]
    return {
        "run": run,
        "step": last["step"],
        "images": last["images"],
        "verdict": verdict["name"],
        **{name: value for name, value in verdict.items() if name != "name"},
        "readings": {name: value for name, value in last.items() if isinstance(value, float)},
        "history": [{**each, "verdict": each["verdict"]["name"]} for each in history],
    }


def to_text(report: Mapping[str, Any]) -> str:
    """Return what is printed for people."""
    lines = [
        f"{report['run']}: {report['verdict']} since step {report['since_step']:,} "
        f"({report['since_images']:,} images), as of step {report['step']:,} ({report['images']:,} images)",
        f"  {report['sentence']}",
    ]
    if report["remedies"]:
        lines += ["", "What has helped others, in the order to try:"]
        lines += [f"  --{each}" for each in report["remedies"]]
    return "\n".join([*lines, "", *_table(report["history"])])


def _table(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The history in columns, of those readings that there are."""
    shown = [name for name in _COLUMNS if any(each.get(name) is not None for each in history)]
    rows = [[*(_COLUMNS[name][0] for name in shown), "verdict"]]
    for each in history:
        values = [each.get(name) for name in shown]
        cells = [
            "-" if value is None else _COLUMNS[name][1].format(value)
            for name, value in zip(shown, values, strict=True)
        ]
        rows.append([*cells, each["verdict"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _what_is_missing(store: Store, folder: str) -> NotFoundError:
    """Say why there is no history, and what is known without one."""
    shown = redact(folder)
    if not store.exists(join(folder, "config.yaml")):
        return NotFoundError(shown, "there is no run here (no config.yaml)")
    known = ""
    if store.exists(place := join(folder, "summary.json")):
        summary = json.loads(store.read(place))
        if "ln_prototypes" not in summary:
            return NotFoundError(shown, "this is a finetuning run; only pretraining is judged")
        if summary.get("loss_last") is not None:
            known = f"; its last loss was {summary['loss_last']:.3f}, ln K is {summary['ln_prototypes']:.3f}"
    return NotFoundError(
        shown,
        f"there is no {HISTORY_FOLDER}/: the run is older than the verdict, had health.verdict off, or has "
        f"not saved yet{known}",
    )
