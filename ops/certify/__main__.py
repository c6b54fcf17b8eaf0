"""Runs what needs a GPU, on a node with 1 to 8 of them: it takes 20 minutes and prints a certificate."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from certify import drill, numerics, stepping
from certify.certificate import ROOT, certificate
from certify.context import (
    FAILED,
    SKIPPED,
    Check,
    Context,
    Finding,
    Options,
    every,
    none,
    on_rank,
    perform,
    two,
)
from streamswav.arguments import Parser
from streamswav.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from streamswav.training.distributed import Ranks

_RANKS_ON_CPU = 2
_SILENT = "no answer"


CHECKS = (
    Check("goldens in float32", numerics.goldens),
    Check("goldens under autocast", numerics.goldens_under_autocast),
    Check("sinkhorn against float64", numerics.sinkhorn_against_float64),
    Check("goldens of two ranks", numerics.goldens_of_two_ranks, ranks=two, fewest=2),
    Check("all ranks against one", numerics.ranks_against_one, ranks=every, fewest=2),
    Check("memory", stepping.memory),
    Check("memory, activation checkpointing", partial(stepping.memory, activation_checkpointing=True)),
    Check("memory, two micro-batches", partial(stepping.memory, micro_batches=2)),
    Check("speed, float32", partial(stepping.speed, compiled=False, exact=True)),
    Check("speed, half precision", partial(stepping.speed, compiled=False, exact=False)),
    Check("speed, float32, compiled", partial(stepping.speed, compiled=True, exact=True)),
    Check("speed, half precision, compiled", partial(stepping.speed, compiled=True, exact=False)),
    Check("no hidden synchronisation", stepping.no_hidden_synchronisation),
    Check("no hidden synchronisation, all ranks", stepping.no_hidden_synchronisation, ranks=every, fewest=2),
    Check("deterministic", stepping.deterministic),
    Check("drain and resume", drill.drain_and_resume, ranks=none, seconds=1200),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print the certificate, and return the exit code."""
    arguments = _parse(argv)
    try:
        checks = _chosen(arguments.only)
        gpus = _count_gpus(arguments.device)
    except ConfigError as error:
        sys.stderr.write(f"certify-gpu: {error}\n")
        return error.exit_code
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        options = Options(arguments.device, gpus, arguments.quick, Path(folder), arguments.goldens)
        findings = []
        for check in checks:
            findings.append(_run(check, options))
            _say(findings[-1])
    doubts = _doubts(arguments, len(checks))
    written = certificate(options, findings, doubts)
    text = json.dumps(written, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)
    verdict = "CERTIFIED" if written["certified"] else "NOT CERTIFIED: " + "; ".join(written["because"])
    sys.stderr.write(f"{verdict}\n")
    return EXIT_FAILED if written["counts"]["failed"] else EXIT_DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="certify-gpu",
        description=__doc__,
        epilog="exit codes: 0 nothing failed (with no GPU, --quick or --only it is no certificate all the "
        "same) · 1 a check failed · 78 no GPU, or an argument that cannot work",
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, which certifies nothing")
    add("--quick", action="store_true", help="tiny shapes and few steps: a rehearsal as well")
    add("--out", type=Path, metavar="FILE", help="where the certificate is written, beside stdout")
    add("--only", nargs="+", metavar="WORD", help="checks with one of these words in their names")
    add(
        "--goldens",
        type=Path,
        metavar="FOLDER",
        default=ROOT / "tests" / "goldens",
        help="recorded results (default: tests/goldens)",
    )
    return parser.parse_args(argv)


def _chosen(words: Sequence[str] | None) -> list[Check]:
    if words is None:
        return list(CHECKS)
    chosen = [check for check in CHECKS if any(word in check.name for word in words)]
    if not chosen:
        names = "; ".join(check.name for check in CHECKS)
        raise ConfigError("--only", f"names none of the checks: {names}", value=" ".join(words))
    return chosen


def _count_gpus(device: str) -> int:
    if device == "cpu":
        return _RANKS_ON_CPU
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ConfigError(
            "--device", "no CUDA device is visible here; --device cpu --quick rehearses without", value=device
        )
    return gpus


def _doubts(arguments: argparse.Namespace, checks: int) -> list[str]:
    found = []
    if arguments.device == "cpu":
        found.append("rehearsed on a CPU")
    if arguments.quick:
        found.append("tiny shapes (--quick)")
    if checks < len(CHECKS):
        found.append(f"{checks} of {len(CHECKS)} checks (--only)")
    if arguments.goldens.resolve() != ROOT / "tests" / "goldens":
        found.append("other goldens (--goldens)")
    return found


def _run(check: Check, options: Options) -> Finding:
    """Run a check in processes of its own, so that what one does to CUDA, or asks of torch, ends with it."""
    began = time.monotonic()
    if options.gpus < check.fewest:
        return Finding(check.name, SKIPPED, f"needs {check.fewest} GPUs")
    world_size = check.ranks(options.gpus)
    if world_size == 0:
        return perform(check, Context(options, Ranks()))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["certify.drill", "certify.stepping", "certify.numerics"])
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=on_rank, args=(check, options, rank, world_size, pipes[rank][1]))
        for rank in range(world_size)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()
    findings = [_receive(check, pipe, began + check.seconds) for pipe, _ in pipes]
    for process in processes:
        process.join(10)
        process.kill()
    # A rank that found something tells more than those that wait for it in vain.
    failed = [each for each in findings if each.outcome == FAILED]
    return min(failed or findings, key=lambda each: each.reason.startswith(_SILENT))


def _receive(check: Check, pipe: multiprocessing.connection.Connection, deadline: float) -> Finding:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return Finding(check.name, FAILED, f"{_SILENT} within {check.seconds:g} s", seconds=check.seconds)
    try:
        finding: Finding = pipe.recv()
    except EOFError:
        return Finding(check.name, FAILED, "the process ended without an answer")
    return finding


def _say(finding: Finding) -> None:
    """One line a check."""
    shown = finding.figures.items() if finding.outcome != SKIPPED else ()
    figures = ", ".join(f"{name} {value}" for name, value in shown)
    told = ": ".join(each for each in (finding.reason, figures) if each)
    sys.stderr.write(f"{finding.outcome:<7} {finding.name:<36} {finding.seconds:>6.1f} s  {told}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main())
