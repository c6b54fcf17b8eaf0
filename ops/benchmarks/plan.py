"""Planning a stream of 400,000 shards and 2 billion samples: seconds, memory, and the size of positions.

    .venv/bin/python ops/benchmarks/plan.py
    .venv/bin/python ops/benchmarks/plan.py --shards 400000 --columns 64 --rows 12 --json plan.json

Nothing is read or listed: the manifest is made up. Peaks are of Python's allocations within a stage, beyond
what was held before it, from one more run of the stage under tracemalloc; seconds are without it, medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from streamswav.stream.grid import Grid, fit_grid
from streamswav.stream.manifest import Manifest, Shard
from streamswav.stream.pieces import Cursor
from streamswav.stream.position import Position

MB = 1e6

Made = TypeVar("Made")


@dataclass(frozen=True)
class Row:
    """What a stage took.

    Attributes:
        stage: its name.
        seconds: median.
        peak_megabytes: most that was allocated at once beyond what was there before.
        json_megabytes: size of what it wrote, where it wrote anything.
    """

    stage: str
    seconds: float
    peak_megabytes: float
    json_megabytes: float | None = None


class Bench:
    """Measures stages one after the other."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.rows: list[Row] = []

    def stage(self, name: str, work: Callable[[], Made]) -> Made:
        """Run a stage some times, once under tracemalloc, and return what it made."""
        times = []
        for _ in range(self._rounds):
            gc.collect()
            began = time.perf_counter()
            made = work()
            times.append(time.perf_counter() - began)
        del made
        gc.collect()
        tracemalloc.start()
        made = work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        written = len(made) / MB if isinstance(made, str) else None
        self.rows.append(Row(name, statistics.median(times), peak / MB, written))
        row = self.rows[-1]
        size = "" if written is None else f"{written:8.2f} MB of JSON"
        print(f"{name:58} {row.seconds:7.2f} s {row.peak_megabytes:8.0f} MB {size}", flush=True)
        return made


def main() -> int:
    options = parse()
    bench = Bench(options.rounds)
    grid = Grid(options.columns * 64, options.columns, options.rows, window=128)
    print(f"{options.shards:,} shards of {options.samples:,} samples on {grid.columns} x {grid.rows} lanes")
    manifest = bench.stage("manifest, with its hash", lambda: make_manifest(options.shards, options.samples))
    stored = bench.stage("manifest to JSON", lambda: json.dumps(manifest.to_json()))
    bench.stage("manifest from JSON", lambda: len(Manifest.from_json(json.loads(stored)).chain))
    begun = Position(manifest.digest, grid, seed=0)
    bench.stage("plan of a pass", lambda: begun.plan(manifest))
    middle = halfway(begun, manifest, options.samples)
    text = bench.stage("position in mid-pass to JSON", lambda: json.dumps(middle.to_json()))
    bench.stage("resume: position from JSON, and its plan", lambda: resume(text, manifest))
    world, workers = options.columns * 3 // 8, options.rows - 1
    other = fit_grid(grid, grid, world_size=world, workers=workers)
    dealt = bench.stage(
        f"re-plan for {world} ranks x {workers} workers, to JSON",
        lambda: json.dumps(Position.from_json(json.loads(text)).on_grid(manifest, other).to_json()),
    )
    bench.stage("resume from the re-planned position, and its plan", lambda: resume(dealt, manifest))
    if options.json:
        summary = {"python": platform.python_version(), "results": [asdict(row) for row in bench.rows]}
        options.json.write_text(json.dumps({**vars(options), "json": None, **summary}, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=400_000, help="tars")
    parser.add_argument("--samples", type=int, default=5000, help="samples in each")
    parser.add_argument("--columns", type=int, default=64, help="V of the lane grid")
    parser.add_argument("--rows", type=int, default=12, help="R of the lane grid")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def make_manifest(shards: int, samples: int) -> Manifest:
    """Shards of about 100 kB a sample."""
    sizes = random.Random(0)
    manifest = Manifest(
        tuple(
            Shard(
                f"part-{index // 1000:04d}/{index:06d}.tar",
                f"s3://bucket/shards/part-{index // 1000:04d}/{index:06d}.tar",
                round(samples * 100_000 * sizes.uniform(0.8, 1.2)),
                f'"{index:032x}"',
            )
            for index in range(shards)
        ),
        (shards * samples,),
    )
    assert manifest.digest
    return manifest


def halfway(begun: Position, manifest: Manifest, samples: int) -> Position:
    """Return the position with every lane in the middle of its shards, and of a window."""
    plan, draw = begun.plan(manifest), random.Random(1)
    cursors = {}
    for lane, pieces in enumerate(plan.lanes):
        segment, ordinal = len(pieces) // 2, samples // 2
        offset = manifest.shards[pieces[segment].shard].size // 2 // 512 * 512
        window = segment * samples // plan.grid.window
        cursors[lane] = Cursor(segment, offset, ordinal, window, ((segment, draw.getrandbits(128)),))
    return begun.advance(cursors, batches=len(manifest.shards) * samples // 2 // begun.grid.batch)


def resume(text: str, manifest: Manifest) -> int:
    """Read a position and make its plan, as every start does."""
    return len(Position.from_json(json.loads(text)).plan(manifest).lanes)


if __name__ == "__main__":
    raise SystemExit(main())
