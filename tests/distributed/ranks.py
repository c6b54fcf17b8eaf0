"""Runs a function on several ranks: real processes that talk through gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RankFunction = Callable[[int, dist.ProcessGroup], Any]


def run_ranks(function: RankFunction, world_size: int, folder: Path) -> list[Any]:
    """Call `function(rank, group)` on each rank and return what the ranks returned, in order."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])
    processes = [
        context.Process(target=_run, args=(function, rank, world_size, folder)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(function: RankFunction, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    group = dist.group.WORLD
    assert group is not None
    torch.save(function(rank, group), folder / f"rank{rank}.pt")
    dist.destroy_process_group()
