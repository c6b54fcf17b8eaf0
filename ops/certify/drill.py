"""A run that loses a rank, is drained, and goes on: the installed command, real shards, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pictures import encode, photograph
from runs import TINY, Outcome, Running, arguments, run, start_ranks

from certify.context import CheckError, Context, Figures, Options

BATCH = 16


def drain_and_resume(context: Context) -> Figures:
    """kill -9 of a rank, SIGTERM, the same command again, and the audit of every byte."""
    options = context.options
    folder, ranks = options.folder / "drill", options.gpus
    passes, images = (8, 160) if options.quick else (20, 320)
    shards = _make_shards(folder, images)
    given = arguments(
        tiny={**TINY, "stream.columns": str(2 * ranks)},
        run={"directory": folder / "run"},
        stream={"urls": shards, "passes": passes, "samples": images},
        training={"device": options.device, "batch": BATCH * ranks},
        loader={"workers": 0 if options.quick else 1},
        checkpoint={"images": 2 * BATCH * ranks, "lease_seconds": 0},
    )
    figures: Figures = {"ranks": ranks, "images": passes * images}
    with _launch(given, folder / "first", options) as running:
        _await(running, _saved)
        os.kill(running.ranks()[-1], signal.SIGKILL)
        _await(running, lambda so_far: so_far.of("resumed") and _saved_since_resumed(so_far))
        figures["resumed after kill -9 at step"] = running.so_far().of("resumed")[-1]["step"]
        running.signal(signal.SIGTERM)
        ended = running.wait(180)
    figures["code after SIGTERM"] = ended.code
    if ended.code != 75:
        raise CheckError(f"after SIGTERM it ended with {ended.code}, not 75: {_last(ended)}", figures)
    with _launch(given, folder / "second", options) as running:
        again = running.wait(300)
    figures["code of the same command"] = again.code
    if again.code != 0:
        raise CheckError(f"the same command ended with {again.code}: {_last(again)}", figures)
    figures["resumed after SIGTERM at step"] = again.of("resumed")[-1]["step"]
    command = ["audit", str(folder / "run"), "--recount", "--workers", "1"]
    audit = run(command, folder / "audit", script=not options.quick)
    figures["code of the audit"] = audit.code
    if audit.code != 0:
        raise CheckError(f"the audit ended with {audit.code}: {_last(audit)}", figures)
    stream = json.loads((folder / "run" / "summary.json").read_text())["stream"]
    figures["trained"], figures["left"] = stream["trained"], stream["left"]
    if stream["trained"] + stream["left"] != passes * images:
        raise CheckError("not every image is accounted for", figures)
    return figures


def _launch(given: list[str], folder: Path, options: Options) -> Running:
    """The installed script; quick: the same from a process that has imported torch."""
    flags = ["--max-restarts", "1"]
    return start_ranks(options.gpus, given, folder, launcher=flags, script=not options.quick)


def _await(running: Running, reached: Callable[[Outcome], object]) -> None:
    try:
        running.wait_until(reached, 240)
    except AssertionError as error:
        raise CheckError(f"the run did not come as far: {str(error).splitlines()[-1]}") from None


def _saved(so_far: Outcome) -> bool:
    return any(event["step"] >= 2 for event in so_far.of("checkpoint"))


def _saved_since_resumed(so_far: Outcome) -> bool:
    return bool(so_far.of("checkpoint")[-1]["step"] > so_far.of("resumed")[-1]["step"])


def _last(outcome: Outcome) -> str:
    return (outcome.said or outcome.err.splitlines() or ["it said nothing"])[-1]


def _make_shards(folder: Path, images: int) -> Path:
    source, shards = folder / "images", folder / "shards"
    source.mkdir(parents=True)
    pictures = [encode(photograph(48, 64, seed=seed)) for seed in range(16)]
    for number in range(images):
        (source / f"{number:04}.jpg").write_bytes(pictures[number % len(pictures)])
    build = Path(sys.executable).with_name("streamswav-shards")
    command = [str(build), "build", str(source), str(shards), "--samples-per-shard", str(images // 8)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise CheckError(f"streamswav-shards build ended with {built.returncode}: {built.stderr.strip()}")
    return shards
