"""What telemetry costs a step: training with all of it and without, turn by turn.

    .venv/bin/python ops/benchmarks/telemetry.py                  # 4 to 8 minutes of one core
    .venv/bin/python ops/benchmarks/telemetry.py --json telemetry.json

One learner takes steps in this process, on one thread, with telemetry and without it by turns. With: the
task keeps what the health of the representation is told by, the monitor hears of every step, as from the
trainer, values lie in a shared folder, a log line with all readings ends each block, and somebody scrapes
once a block. Without: the learner's step alone. What counts is the core's time.

`overhead_ratio` is what telemetry's own calls took, against steps without it: medians over the blocks.
`difference_ratio` is the difference between both kinds of steps, which also has what telemetry does to the
rest (caches, allocator), and the noise of steps: the median over the blocks, and between which values it
lies with 95%. `accounted` is what `streamswav_telemetry_seconds_total` says of itself, in seconds of the
clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine

from streamswav.config import parse_config
from streamswav.crops import Augment
from streamswav.heartbeat import METRICS_VARIABLE
from streamswav.telemetry.exporter import Source, serve
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.multiprocess import collected_registry
from streamswav.telemetry.progress import Reporter
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks
from streamswav.training.monitor import Monitor
from streamswav.training.open_steps import Settled
from streamswav.training.pace import Stride
from streamswav.training.phases import PhaseClock
from streamswav.training.pretraining import Calendar, Pretraining

CROPS = ((2, 64), (4, 32))
PROTOTYPES = 1000
RATE = 0.01


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[METRICS_VARIABLE] = folder
        result = measure(options, Path(folder))
    print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "telemetry": result}, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    ranks, metrics = Ranks(), Metrics()
    task = build_task(options.images, ranks)
    monitor = Monitor(metrics, Reporter(silent=True), ranks, log_seconds=1e9)
    monitor.begin(step=0, images=0, loss_first=5.0)
    crops = [torch.randn(n * options.images, 3, size, size) for n, size in CROPS]
    blocks: list[Block] = []
    with serve(Source(metrics), port=options.port, bind="127.0.0.1"):
        for _ in range(options.blocks + 1):
            blocks.append(take_block(task, crops, monitor, options, folder))
    del blocks[0]  # warms up
    bare = statistics.median(block.without for block in blocks) / options.steps
    within = statistics.median(block.told for block in blocks) / options.steps
    ratios = sorted(block.watched / block.without - 1 for block in blocks)
    own = collected_registry(folder).get_sample_value("streamswav_telemetry_seconds_total") or 0.0
    steps = options.steps * (options.blocks + 1)
    low, high = median_interval(len(ratios))
    return {
        "step_seconds_without": round(bare, 6),
        "telemetry_seconds_a_step": round(within, 6),
        "overhead_ratio": round(within / bare, 5),
        "difference_ratio": round(statistics.median(ratios), 5),
        "difference_ratio_95": [round(ratios[low], 5), round(ratios[high], 5)],
        "accounted_seconds_a_step": round(own / steps, 7),
        "accounted_ratio": round(own / steps / bare, 5),
        "steps_a_block": options.steps,
        "blocks": options.blocks,
    }


@dataclass
class Block:
    """Seconds of the core: of steps without telemetry, of steps with it, and of telemetry within these."""

    without: float = 0.0
    watched: float = 0.0
    told: float = 0.0


def take_block(
    task: Pretraining,
    crops: list[torch.Tensor],
    monitor: Monitor,
    options: argparse.Namespace,
    folder: Path,
) -> Block:
    """Take steps of both kinds by turns, each first in every second pair, then a log line and a scrape."""
    block = Block()
    for number in range(options.steps):
        for watched in (True, False) if number % 2 else (False, True):
            began = time.process_time()
            if watched:
                block.told += take_watched(task, crops, monitor, number, options.images)
                block.watched += time.process_time() - began
            else:
                task.learner.clock = PhaseClock()
                task.learner.step(crops, rate=RATE, freeze_prototypes=False, use_queue=False)
                block.without += time.process_time() - began
    began = time.process_time()
    images = options.images * options.steps
    monitor.settled(Settled(trained=images, skipped_steps=0), in_a_row=0)
    monitor.log(step=options.steps, images=images, fraction=0.5, rate=RATE, quarantined=0, read=task.readings)
    list(collected_registry(folder).collect())  # a scrape, by this same thread
    spent = time.process_time() - began
    block.told += spent
    block.watched += spent
    task.settled([False] * options.steps)
    return block


def take_watched(
    task: Pretraining, crops: list[torch.Tensor], monitor: Monitor, number: int, images: int
) -> float:
    """Take a step as the trainer does, and return the core's seconds that telling of it took."""
    task.learner.clock = monitor.clock
    with monitor.clock.within("forward_backward"):
        result = task.step(crops, Stride(rate=RATE, images=images * number, done=0.0))
    began = time.process_time()
    monitor.stepped(result, step=number + 1, images=images * (number + 1), rate=RATE, watch=task.watch)
    return time.process_time() - began


def median_interval(count: int) -> tuple[int, int]:
    """Return the places, among so many values in order, between which their median lies with 95%."""
    reach = round(1.96 * count**0.5 / 2)
    return max(0, count // 2 - reach), min(count - 1, (count - 1) // 2 + reach)


def build_task(images: int, ranks: Ranks) -> Pretraining:
    config = parse_config(
        {
            "crops": {
                "sizes": [s for _, s in CROPS],
                "counts": [n for n, _ in CROPS],
                "scales": [[0.3, 1], [0.1, 0.3]],
            },
            "model": {"trunk": "resnet18", "stem": "small"},
            "swav": {"prototypes": PROTOTYPES, "queue_length": 0, "epsilon": 0.05, "iterations": 3},
            "training": {"batch": images, "precision": "float32"},
            "optimizer": {"rate": RATE},
        }
    )
    learner = build_learner(config, ranks)
    calendar = Calendar(freeze_until=0, queue_from=0)
    return Pretraining(learner, Augment(config.crops), calendar, prototypes=PROTOTYPES, ranks=ranks)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4, help="of a step")
    parser.add_argument(
        "--steps", type=int, default=10, help="of a block, which ends with a log line and a scrape"
    )
    parser.add_argument("--blocks", type=int, default=10, help="each of steps of both kinds")
    parser.add_argument("--port", type=int, default=0, help="serve meanwhile")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
