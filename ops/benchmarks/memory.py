"""Peak memory of a loader process that reads many lanes, beside its budget (`stream.memory`).

    .venv/bin/python ops/benchmarks/memory.py
    .venv/bin/python ops/benchmarks/memory.py --budget 2147483648 --lanes 8 256 --json memory.json
    .venv/bin/python ops/benchmarks/memory.py --shards 8 --lanes 16 64

Every row is a loader process of its own. It reads two windows of every lane from local files (a few shards
under many names), in turns, and gives the samples away undecoded. Its base is what it holds before it reads;
the peak is the kernel's (VmHWM), so that the allocator's waste counts. "Read" is bytes read over bytes of the
shards: samples that found no room in their window are read again. With few shards the lanes stride them.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import IterableDataset

from streamswav.config import StorageSection
from streamswav.processes import Failed, open_loader
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import list_manifest
from streamswav.stream.plan import Deal, Plan, make_plan
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader
from streamswav.stream.store import Store
from streamswav.stream.store.local import LocalFiles

MiB = 1 << 20
SHARDS_A_LANE = 4


@dataclass(frozen=True)
class Reading(IterableDataset):
    """Reads all lanes of a plan, `share` samples of each in turn, and tells what that took."""

    plan: Plan
    reader: ShardReader

    def __iter__(self) -> Iterator[dict[str, float]]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        base, began, samples = status("VmRSS"), time.perf_counter(), 0
        grid = self.plan.grid
        self.reader.share_among(grid.lanes, grid.window)
        shelf, read = self.reader.shelf, count_reads()
        lanes = [LaneReader(self.plan, lane, self.reader.open, shelf=shelf) for lane in range(grid.lanes)]
        for lane in lanes:
            if piece := lane.next_piece:
                self.reader.begin(piece)
        going = True
        while going:
            going = False
            for lane in lanes:
                lane.ask(grid.share)
            for lane in lanes:
                for _ in range(grid.share):
                    if next(lane, None) is not None:
                        samples, going = samples + 1, True
        yield {
            "lanes": grid.lanes,
            "peak_over_base": status("VmHWM") - base,
            "base": base,
            "held_at_most": shelf.peak,
            "read": sum(read) / sum(shard.size for shard in self.reader.manifest.shards),
            "requests": len(read),
            "samples": samples,
            "samples_a_second": samples / (time.perf_counter() - began),
        }


def main() -> int:
    options = parse()
    rows = []
    print(
        f"budget {options.budget / MiB:.0f} MiB, windows of {options.window} samples of {options.size} bytes"
    )
    print(" lanes  windows MiB  held MiB  peak over base MiB  of the budget  read  requests  samples/s")
    with tempfile.TemporaryDirectory() as folder:
        samples = options.window // 2 if options.shards is None else options.window * 4
        sources = build(Path(folder, "sources"), samples=samples, size=options.size)
        for lanes in options.lanes:
            shards = options.shards or lanes * SHARDS_A_LANE
            row = measure(link(Path(folder, str(lanes)), sources, shards), lanes, options)
            rows.append({**row, "budget": options.budget})
            print(describe(row, options))
    if options.json:
        options.json.write_text(json.dumps({"window": options.window, "results": rows}, indent=1) + "\n")
    return int(any(row["peak_over_base"] > row["budget"] for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", type=int, nargs="+", default=[8, 64, 512], help="lanes of the process")
    parser.add_argument("--budget", type=int, default=512 * MiB, help="stream.memory in bytes")
    parser.add_argument("--window", type=int, default=128, help="samples of a window")
    parser.add_argument("--size", type=int, default=100_000, help="bytes of a sample, on average")
    parser.add_argument("--shards", type=int, help="shards; by default four a lane, which none must stride")
    parser.add_argument("--share", type=int, default=2, help="samples that a lane gives in turn")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def describe(row: dict[str, float], options: argparse.Namespace) -> str:
    """A line of the table."""
    windows, peak = row["lanes"] * options.window * options.size, row["peak_over_base"]
    return (
        f"{row['lanes']:6} {windows / MiB:12.0f} {row['held_at_most'] / MiB:9.0f} {peak / MiB:19.0f} "
        f"{peak / options.budget:14.2f} {row['read']:5.2f} {row['requests']:9} "
        f"{row['samples_a_second']:10.0f}"
    )


def measure(folder: Path, lanes: int, options: argparse.Namespace) -> dict[str, float]:
    """Read the shards in a loader process."""
    manifest = list_manifest([str(folder)], Store())
    grid = Grid(lanes * options.share, lanes, 1, options.window)
    sizes = [shard.size for shard in manifest.shards]
    plan = make_plan(Deal(tuple(range(len(sizes)))), sizes, grid=grid, seed=0, turn=0, generation=0)
    reader = ShardReader(manifest, StorageSection(), read_ahead=2, memory=options.budget)
    with open_loader(Reading(plan, reader), workers=1) as rows:
        for row in rows:
            if isinstance(row, Failed):
                raise row.error
            if row is not None:
                return row
    raise AssertionError("the process gives a row")


def count_reads() -> list[int]:
    """A list to which every read of a file adds its length."""
    lengths: list[int] = []
    read = LocalFiles.read

    def counted(*asked: object) -> bytes:
        data = read(*asked)
        lengths.append(len(data))
        return data

    LocalFiles.read = counted
    return lengths


def status(name: str) -> int:
    """Bytes of a field of this process' status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024


def build(folder: Path, *, samples: int, size: int) -> list[Path]:
    """A few shards of samples between half and one and a half of the size."""
    folder.mkdir()
    generator, paths = random.Random(0), []
    for shard in range(4):
        paths.append(folder / f"{shard}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for index in range(samples):
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = generator.randint(size // 2, size * 3 // 2)
                archive.addfile(member, io.BytesIO(bytes(member.size)))
    return paths


def link(folder: Path, sources: list[Path], count: int) -> Path:
    """The shards under many names."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:06d}.tar").symlink_to(sources[index % len(sources)])
    return folder


if __name__ == "__main__":
    sys.exit(main())
