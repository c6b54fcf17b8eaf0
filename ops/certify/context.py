"""What a check is given and what it answers, and the process that it runs in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamswav.training.distributed import Ranks

PASSED, FAILED, SKIPPED = "pass", "FAIL", "skipped"

Figures = dict[str, Any]


class CheckError(Exception):
    """What a check found wrong, with the figures so far."""

    def __init__(self, reason: str, figures: Figures | None = None) -> None:
        super().__init__(reason)
        self.figures = figures or {}


class SkippedError(Exception):
    """Why a check has no place here."""


@dataclass(frozen=True)
class Options:
    """Of the whole certification.

    Attributes:
        device: cuda or cpu.
        gpus: that are used; on a CPU ranks that stand in for them.
        quick: tiny shapes and few steps.
        folder: for what a check writes.
        goldens: folder of the recorded results.
    """

    device: str
    gpus: int
    quick: bool
    folder: Path
    goldens: Path


@dataclass(frozen=True)
class Context:
    """One process of a check: the options, and its rank among those of the check."""

    options: Options
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def cuda(self) -> bool:
        return self.ranks.device.type == "cuda"

    def need_gpu(self) -> None:
        if not self.cuda:
            raise SkippedError("needs a GPU")

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


Run = Callable[[Context], Figures]


def one(_: int) -> int:
    return 1


def two(_: int) -> int:
    return 2


def every(gpus: int) -> int:
    return gpus


def none(_: int) -> int:
    return 0


@dataclass(frozen=True)
class Check:
    """One line of the certificate.

    Attributes:
        name: of the line.
        run: on every rank; what rank 0 returns are the figures.
        ranks: how many, of the GPUs that there are; 0: no process of its own, it starts what it needs.
        fewest: GPUs without which it is skipped.
        seconds: after which it is given up.
    """

    name: str
    run: Run
    ranks: Callable[[int], int] = one
    fewest: int = 1
    seconds: float = 600.0


@dataclass
class Finding:
    """How a check went."""

    name: str
    outcome: str
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0


def perform(check: Check, context: Context) -> Finding:
    """Run a check on this rank. Whatever goes wrong is its finding."""
    began = time.perf_counter()
    finding = Finding(check.name, PASSED)
    try:
        finding.figures = check.run(context)
        context.synchronise()
    except SkippedError as skipped:
        finding.outcome, finding.reason = SKIPPED, str(skipped)
    except CheckError as error:
        finding.outcome, finding.reason, finding.figures = FAILED, str(error), error.figures
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        finding.outcome, finding.reason = FAILED, f"{type(error).__name__}: {lines[0]}"
    finding.seconds = round(time.perf_counter() - began, 1)
    return finding


def on_rank(check: Check, options: Options, rank: int, world_size: int, pipe: Any) -> None:
    """Be one process of a check: join the others, run it, and send the finding."""
    torch.set_num_threads(1 if options.quick else max(1, torch.get_num_threads() // world_size))
    device = torch.device("cpu")
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        # float32 means float32 here; the bars are those of float32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if world_size == 1:
        pipe.send(perform(check, Context(options, Ranks(device=device))))
        return
    meeting = f"file://{options.folder}/meeting-{check.name.replace(' ', '-')}"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world_size
    )
    control = dist.new_group(backend="gloo")
    assert isinstance(control, dist.ProcessGroup)
    ranks = Ranks(rank, world_size, rank, device, dist.group.WORLD, control)
    pipe.send(perform(check, Context(options, ranks)))
    dist.destroy_process_group()


def within(figures: Figures, name: str, value: float, bar: float) -> None:
    """Take note of a figure.

    Raises:
        CheckError: it is above its bar, or not a number.
    """
    figures[name] = float(f"{value:.3g}") if math.isfinite(value) else str(value)
    if not value <= bar:
        raise CheckError(f"{name} is {figures[name]}, above {bar:g}", figures)
