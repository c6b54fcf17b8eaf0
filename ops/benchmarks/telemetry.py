"""What telemetry costs a step: training with all of it and without, turn by turn.

    .venv/bin/python ops/benchmarks/telemetry.py                  # 2 minutes of one core
    .venv/bin/python ops/benchmarks/telemetry.py --json telemetry.json

One learner takes blocks of steps in this process, on one thread. With: the task keeps what the health of
the representation is told by, the monitor hears of every step, as from the trainer, values lie in a
shared folder, a log line with all readings ends each block, and somebody scrapes once a block. Without:
the learner's step alone. What counts is the core's time, its median over the blocks of each kind; blocks
are interleaved, so that what else the machine does meets both. `accounted` is what
`streamswav_telemetry_seconds_total` says of itself, in seconds of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
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
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with serve(Source(metrics), port=options.port, bind="127.0.0.1"):
        for block in range(2 * options.blocks + 2):
            told = block % 2 == 0
            spent = take_steps(task, crops, monitor if told else None, options, folder)
            if block >= 2:  # the first of each kind warms up
                seconds[told].append(spent / options.steps)
    with_all, without = (statistics.median(seconds[told]) for told in (True, False))
    own = collected_registry(folder).get_sample_value("streamswav_telemetry_seconds_total") or 0.0
    steps = options.steps * (options.blocks + 1)
    return {
        "step_seconds_without": round(without, 6),
        "step_seconds_with": round(with_all, 6),
        "overhead_ratio": round(with_all / without - 1, 5),
        "accounted_seconds_a_step": round(own / steps, 7),
        "accounted_ratio": round(own / steps / without, 5),
        "steps_a_block": options.steps,
        "blocks": options.blocks,
    }


def take_steps(
    task: Pretraining,
    crops: list[torch.Tensor],
    monitor: Monitor | None,
    options: argparse.Namespace,
    folder: Path,
) -> float:
    """Take a block of steps, told to the monitor if there is one, and return the seconds."""
    task.learner.clock = monitor.clock if monitor else PhaseClock()
    began = time.process_time()
    for number in range(options.steps):
        stride = Stride(rate=0.01, images=options.images * number, done=0.0)
        if monitor is None:
            task.learner.step(crops, rate=stride.rate, freeze_prototypes=False, use_queue=False)
            continue
        with monitor.clock.within("forward_backward"):
            result = task.step(crops, stride)
        monitor.stepped(result, step=number + 1, images=options.images * (number + 1), rate=0.01)
    if monitor is not None:
        images = options.images * options.steps
        monitor.settled(Settled(trained=images, skipped_steps=0), in_a_row=0)
        monitor.log(
            step=options.steps, images=images, fraction=0.5, rate=0.01, quarantined=0, read=task.readings
        )
        list(collected_registry(folder).collect())  # a scrape, by this same thread
    spent = time.process_time() - began
    if monitor is not None:
        task.settled([False] * options.steps)
    return spent


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
            "optimizer": {"rate": 0.01},
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
    parser.add_argument("--blocks", type=int, default=10, help="of each kind")
    parser.add_argument("--port", type=int, default=0, help="serve meanwhile")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
