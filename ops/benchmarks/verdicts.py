"""Runs that are made to fail on purpose, and runs that are not: does each get the right verdict, and when?

    .venv/bin/python ops/benchmarks/verdicts.py --out verdicts                # half an hour on 2 free cores
    .venv/bin/python ops/benchmarks/verdicts.py --out verdicts --cases healthy epsilon --seeds 2 3 --json FILE

Every trial is `streamswav pretrain` with the quickstart's recipe on Fashion-MNIST, shortened: 19,200 images
that go wrong at a constant rate, 38,400 if nothing is wrong; prototypes rest for 3,200 images and there is
a verdict from 9,600 images (75 steps) on. It is right if the first bad verdict is an expected one, in time,
or if there is none and none is expected. A trial that was done before is read, not run again.

"Without unit length" is no setting: that trial trains a network whose embeddings are left as long as they
are. It is the same program with one function of the network replaced, in a process of its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import machine
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from streamswav.cli import enter
from streamswav.models import network
from streamswav.stream.store import Store
from streamswav.telemetry.verdict import BAD
from streamswav.training.history import read_history

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "ops/recipes/quickstart.yaml"
DATA = Path("/usr/share/datasets/fashion-mnist")
LONG_BEFORE_ITS_END = 10**9

BASE = {
    "stream.passes": 1,
    "optimizer.warmup_images": 6400,
    "swav.freeze_prototypes_images": 3200,
    "health.warmup_images": 9600,
    "health.hold_steps": 15,
    "telemetry.port": 0,
    "telemetry.log_seconds": 0.5,
    "loader.workers": 1,
}
WRONG = {"training.images": 19_200, "optimizer.schedule": "constant"}


@dataclass(frozen=True)
class Case:
    """A kind of run.

    Attributes:
        keys: on top of the recipe's and `BASE`.
        expected: verdicts that are right; none: no bad one is.
        within: steps until one of them has to be there.
        constant: all images are the same one.
        program: what is run; see `main`.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    expected: tuple[str, ...] = ()
    within: int = 150
    constant: bool = False
    program: Sequence[str] = ("-m", "streamswav")


CASES = {
    "healthy": Case({"training.images": 38_400}),
    "healthy, with a queue": Case(
        {"training.images": 38_400, "swav.queue_length": 512, "swav.queue_start_images": 19_200}
    ),
    "quickstart": Case(
        {"stream.passes": 6, "optimizer.warmup_images": 36_000, "health.warmup_images": "null"}
    ),
    "no unit length": Case(WRONG, ("diverging", "stuck"), program=(__file__, "--without-unit-length")),
    "epsilon 1": Case({**WRONG, "swav.epsilon": 1.0}, ("stuck",)),
    "rate 30": Case({**WRONG, "optimizer.rate": 30.0}, ("diverging",)),
    "queue at once": Case(
        {**WRONG, "swav.queue_length": 3840, "swav.queue_start_images": 0}, ("queue_rebound",)
    ),
    "constant images": Case(WRONG, ("stuck",), constant=True),
    "3 prototypes": Case({**WRONG, "swav.prototypes": 3}, ("dimensional_collapse", "diverging")),
}


@dataclass(frozen=True)
class Row:
    """What became of a trial; `verdicts` are those it had, in order, `right_after` and `since` are steps."""

    case: str
    seed: int
    steps: int
    expected: str
    verdicts: tuple[str, ...]
    right_after: int | None
    since: int | None
    passed: bool
    sentence: str
    loss: float | None
    ln_k: float


def judge(name: str, seed: int, lines: Sequence[Mapping[str, Any]]) -> Row:
    """Compare the verdicts of a run's history with what is right."""
    case = CASES[name]
    held = [each["verdict"] for each in lines]
    names = [each["name"] for each in held]
    changes = [each for at, each in enumerate(names) if at == 0 or names[at - 1] != each]
    wanted = case.expected or ("healthy",)
    right = next((at for at, each in enumerate(names) if each in wanted), None)
    after = lines[right]["step"] if right is not None else None
    bad = [at for at, each in enumerate(names) if each in BAD]
    if case.expected:
        first = names[bad[0]] if bad else None
        passed = first in case.expected and after is not None and after <= case.within
    else:
        passed = not bad and names[-1] == "healthy"
    shown = held[right if right is not None and case.expected else (bad[0] if bad else -1)]
    return Row(
        name,
        seed,
        lines[-1]["step"],
        " or ".join(case.expected) or "no bad one",
        tuple(changes),
        after,
        shown["since_step"],
        passed,
        shown["sentence"],
        lines[-1]["loss"],
        lines[-1]["ln_prototypes"],
    )


def run(name: str, seed: int, shards: Mapping[bool, Path], out: Path) -> list[dict[str, Any]]:
    """Train, unless that is done, and return the history."""
    case, folder = CASES[name], out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    keys = {
        **BASE,
        **case.keys,
        "stream.urls": shards[case.constant],
        "stream.seed": seed,
        "run.directory": folder,
    }
    if case.constant:
        keys["stream.passes"] = 2
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.jsonl").open("a") as log:
            command = [sys.executable, *case.program, "pretrain", "--config", str(RECIPE), *words]
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
        if code not in (0, 78):  # 78: so far gone that the run was ended
            raise SystemExit(f"{name}, seed {seed}: exit code {code}; {folder / 'log.jsonl'} says why")
    return read_history(Store(), str(folder), most=LONG_BEFORE_ITS_END)


def build_shards(data: Path, out: Path) -> dict[bool, Path]:
    """Pack the images, and 10,000 times the first of them, once."""
    shards = {False: out / "shards", True: out / "shards-of-one-image"}
    tool = [str(Path(sys.executable).with_name("streamswav-shards")), "build"]
    sizes = ["--samples-per-shard", "1000"]
    if not shards[False].exists():
        subprocess.run([*tool, str(data), str(shards[False]), "--split", "train", *sizes], check=True)
    if not shards[True].exists():
        images = out / "one-image" / "same"
        images.mkdir(parents=True, exist_ok=True)
        pixels = gzip.decompress((data / "train-images-idx3-ubyte.gz").read_bytes())[16 : 16 + 28 * 28]
        for number in range(10_000):
            Image.frombytes("L", (28, 28), pixels).save(images / f"{number:05}.png")
        subprocess.run([*tool, str(images.parent), str(shards[True]), *sizes], check=True)
    return shards


def to_table(rows: Sequence[Row]) -> str:
    """Return the trials as a Markdown table."""
    head = "| trial | seed | right | verdicts | after step | why |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {each.case} | {each.seed} | {'yes' if each.passed else 'NO'} | {' > '.join(each.verdicts)} | "
        f"{each.right_after or '-'} | {each.sentence} |"
        for each in rows
    )


def without_unit_length(words: Sequence[str]) -> int:
    """Train a network that leaves embeddings as long as they are; prototypes are normalised as ever."""

    class Functions:
        """`torch.nn.functional` as the network uses it, but for what comes with a gradient."""

        @staticmethod
        def normalize(values: Tensor, *, dim: int) -> Tensor:
            return values if values.grad_fn is not None else F.normalize(values, dim=dim)

    network.F = Functions  # type: ignore[assignment]  # the one function that the network takes from it
    sys.argv[1:] = words
    return enter()


def main() -> int:
    """Run what was asked for; 1 where a verdict was wrong."""
    if sys.argv[1:2] == ["--without-unit-length"]:
        return without_unit_length(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("verdicts"), help="shards and runs (default: verdicts)"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="Fashion-MNIST, as Debian has it")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    shards = build_shards(args.data, args.out)
    rows = []
    for name in args.cases:
        for seed in args.seeds:
            rows.append(judge(name, seed, run(name, seed, shards, args.out)))
            print(to_table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{to_table(rows)}")
    if args.json:
        figures = {"machine": machine("torch"), "rows": [asdict(each) for each in rows]}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(each.passed for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
