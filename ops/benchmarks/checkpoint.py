"""What a checkpoint costs the trainer: waited for, and written in the background; to disk and to S3.

    .venv/bin/python ops/benchmarks/checkpoint.py
    .venv/bin/python ops/benchmarks/checkpoint.py --trunk resnet50 --rounds 5 --json checkpoint.json

A learner takes real steps on noise, in this process. Between them it is saved as a run saves it: by the
`Saver`, with queue, optimizer and checksums, into a folder and into a bucket of a local `rclone serve s3`.
First each save is waited for; then training goes on while it is written, and the steps meanwhile are timed
beside those before. Trainer, writer and server share the cores here (`--threads` leaves some of them free):
on a GPU node the steps do not need them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from streamswav.config import Config, StorageSection, parse_config
from streamswav.stream.grid import Grid
from streamswav.stream.position import Position
from streamswav.stream.store import Store, join
from streamswav.training.build import build_learner
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder
from streamswav.training.distributed import Ranks
from streamswav.training.saver import Saver

KEYS = ("STREAMSWAVBENCH", "streamswav-secret")


@dataclass(frozen=True)
class Row:
    """What saves to one place cost; medians over the rounds, in seconds.

    Attributes:
        place: disk or s3.
        bytes: of a checkpoint.
        waited_seconds: for which training stands still where a save is waited for.
        stall_seconds: for which it does where the save is written in the background.
        upload_seconds: until that is committed.
        step_seconds: of a step before.
        step_during_seconds: of a step while it is written.
        slowest_during_seconds: the slowest of those.
    """

    place: str
    bytes: int
    waited_seconds: float
    stall_seconds: float
    upload_seconds: float
    step_seconds: float
    step_during_seconds: float
    slowest_during_seconds: float


class Listener:
    """Hears when a checkpoint is committed."""

    def __init__(self) -> None:
        self.committed = threading.Event()
        self.stalls: list[float] = []
        self.uploads: list[float] = []
        self.bytes = 0

    def staged(self, seconds: float) -> None:
        self.stalls.append(seconds)

    def saved(self, checkpoint: Checkpoint, seconds: float) -> None:
        self.bytes = checkpoint.size
        self.uploads.append(seconds)
        self.committed.set()

    def save_failed(self, reason: str) -> None:
        sys.exit(reason)

    def save_delayed(self) -> None: ...


class Trainer:
    """Takes steps on noise, and saves."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.config = configured(options)
        self._learner = build_learner(self.config, Ranks())
        size = self.config.crops.sizes[0]
        self._crops = [torch.randn(2 * options.batch, 3, size, size)]
        position = Position("benchmark", Grid(options.batch, 1, 1, 1), 0)
        self._feed = SimpleNamespace(
            synchronise=lambda: position, unwritten=[], manifest=SimpleNamespace(shards=())
        )
        self._number = 0

    def step(self) -> float:
        began = time.perf_counter()
        self._learner.step(self._crops, rate=0.01, freeze_prototypes=False, use_queue=True)
        return time.perf_counter() - began

    def save(self, saver: Saver, *, wait: bool) -> float:
        self._number += 1
        began = time.perf_counter()
        saver.save(self._learner, self._feed, step=self._number, loss_first=None, wait=wait)  # type: ignore[arg-type]
        return time.perf_counter() - began


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    for _ in range(3):
        trainer.step()
    with tempfile.TemporaryDirectory() as made, s3_server(Path(made, "s3")) as section:
        places = [
            ("disk", str(Path(made, "run")), Store()),
            ("s3", "s3://bench/run", Store(section)),
        ]
        rows = [measure(trainer, *place, options) for place in places]
    if options.json:
        summary = {"python": platform.python_version(), "torch": torch.__version__}
        results = {"results": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps({**vars(options), "json": None, **summary, **results}, indent=1))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--batch", type=int, default=4, help="images of a step, with two crops each")
    parser.add_argument("--crop", type=int, default=64, help="their size in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed before")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def configured(options: argparse.Namespace) -> Config:
    return parse_config(
        {
            "model": {"trunk": options.trunk},
            "crops": {"sizes": [options.crop], "counts": [2], "scales": [[0.1, 1.0]]},
            "swav": {"prototypes": 3000, "epsilon": 0.05, "iterations": 3, "queue_length": 3840},
            "optimizer": {"rate": 0.01},
            "training": {"batch": options.batch, "precision": "float32"},
            "checkpoint": {"keep": 1},
        }
    )


def measure(trainer: Trainer, place: str, url: str, store: Store, options: argparse.Namespace) -> Row:
    config = trainer.config.model_copy(
        update={"run": trainer.config.run.model_copy(update={"directory": url})}
    )
    heard = Listener()
    folder = CheckpointFolder(join(url, "checkpoints"), store)
    saver = Saver(folder, store, config, Ranks(), listener=heard)
    trainer.save(saver, wait=True)  # the first one allocates
    before = [trainer.step() for _ in range(options.steps)]
    waited = [trainer.save(saver, wait=True) for _ in range(options.rounds)]
    stalls, during = [], []
    heard.uploads.clear()
    for _ in range(options.rounds):
        heard.committed.clear()
        stalls.append(trainer.save(saver, wait=False))
        while not heard.committed.is_set():
            during.append(trainer.step())
        saver.close()
    median = statistics.median
    row = Row(
        place=place,
        bytes=heard.bytes,
        waited_seconds=median(waited),
        stall_seconds=median(stalls),
        upload_seconds=median(heard.uploads),
        step_seconds=median(before),
        step_during_seconds=median(during),
        slowest_during_seconds=max(during),
    )
    print(
        f"{place:<5} {row.bytes / 1e6:.0f} MB  waited for: stands still {row.waited_seconds:.2f} s  "
        f"in the background: {row.stall_seconds:.3f} s, written in {row.upload_seconds:.2f} s  "
        f"step {1000 * row.step_seconds:.0f} ms, meanwhile {1000 * row.step_during_seconds:.0f} ms "
        f"(slowest {1000 * row.slowest_during_seconds:.0f})",
        flush=True,
    )
    return row


@contextmanager
def s3_server(folder: Path) -> Iterator[StorageSection]:
    """Run a local S3 server for as long as the context lasts."""
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = KEYS
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    (folder / "bench").mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    beside = Path(sys.executable).with_name("rclone")
    command = [str(beside) if beside.exists() else "rclone", "serve", "s3", "--auth-key", ",".join(KEYS)]
    command += ["--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield StorageSection(endpoint_url=f"http://127.0.0.1:{port}", deadline_seconds=60)
        finally:
            server.terminate()


if __name__ == "__main__":
    raise SystemExit(main())
