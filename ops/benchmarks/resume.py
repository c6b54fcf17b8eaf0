"""What resuming costs at 1%, 50% and 99% of a long pass: bytes read again, and seconds to the first batch.

    .venv/bin/python ops/benchmarks/resume.py
    .venv/bin/python ops/benchmarks/resume.py --shards 64 --samples 2000 --size 4096 --json resume.json

Local shards are read by a grid of lanes as in training, undecoded, in this process. One run goes through and
notes its position, as JSON, and the bytes asked for so far. From each position alone another run goes on to
the end. What it asks for beyond the samples that were still to come was read again: the parts of windows that
were given before. What the first run had asked for beyond what it had given was dropped: the rest of those
windows, and blocks on their way. Both are of all lanes. Give a lane four shards or more, as training does
where it can: lanes that stride one shard read what the others skip, and these figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import webdataset

from streamswav.config import CropsSection, StorageSection
from streamswav.crops import Crops, MultiCrop
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import Store
from streamswav.training.budgets import Budgets
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, FeedSettings

PLACES = (0.01, 0.5, 0.99)
SETTINGS = FeedSettings(workers=0, prefetch=2, budgets=Budgets(0.0, 0, 0.0))


@dataclass(frozen=True)
class Row:
    """What a start cost.

    Attributes:
        place: share of the pass that was done.
        first_batch_seconds: median time from the position's JSON to the first batch.
        again_bytes: read again by the new run, to the end of the pass.
        again_ratio: the same over the bytes of all shards.
        windows: the same in windows of all lanes.
        dropped_bytes: that the first run had read ahead.
        position_bytes: of the position's JSON.
    """

    place: float
    first_batch_seconds: float
    again_bytes: int
    again_ratio: float
    windows: float
    dropped_bytes: int
    position_bytes: int


class Undecoded(MultiCrop):
    """Makes nothing of an image: what is measured is the stream."""

    def __call__(self, image: bytes, *, key: tuple[int, ...]) -> Crops:  # noqa: ARG002
        return Crops((), torch.zeros(0, 0))


class Asked:
    """Bytes of all ranged reads so far, as `Store` is asked for them."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counting(self) -> Iterator[Asked]:
        """Count for as long as the context lasts."""
        read = Store.read_range

        def counted(store: Store, url: str, start: int, stop: int, *, version: str | None = None) -> bytes:
            self.bytes += stop - start
            return read(store, url, start, stop, version=version)

        Store.read_range = counted  # type: ignore[method-assign]
        try:
            yield self
        finally:
            Store.read_range = read  # type: ignore[method-assign]


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as made, Asked().counting() as asked:
        folder = build(Path(made, "shards"), options)
        manifest = list_manifest([str(folder)], Store())
        rows = measure(manifest, options, asked)
    if options.json:
        results = [asdict(row) for row in rows]
        summary = {"python": platform.python_version(), "results": results}
        options.json.write_text(json.dumps({**vars(options), "json": None, **summary}, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=64, help="tars")
    parser.add_argument("--samples", type=int, default=2000, help="samples in each")
    parser.add_argument("--size", type=int, default=4096, help="bytes of an image")
    parser.add_argument("--columns", type=int, default=8, help="V of the lane grid")
    parser.add_argument("--rows", type=int, default=2, help="R of the lane grid")
    parser.add_argument("--batch", type=int, default=256, help="G, samples of a batch")
    parser.add_argument("--block", type=int, default=1 << 20, help="bytes of a ranged read")
    parser.add_argument("--rounds", type=int, default=5, help="starts that are timed, at each place")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def build(folder: Path, options: argparse.Namespace) -> Path:
    """Write shards of images that nobody decodes."""
    folder.mkdir()
    image = bytes(options.size)
    for shard in range(options.shards):
        with (folder / f"{shard:05d}.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
            for index in range(options.samples):
                writer.write({"__key__": f"{shard:05d}{index:05d}", "jpg": image})
    return folder


def measure(manifest: Manifest, options: argparse.Namespace, asked: Asked) -> list[Row]:
    grid = Grid(options.batch, options.columns, options.rows, window=128)
    begun = json.dumps(Position(manifest.digest, grid, seed=0).to_json())
    total = options.shards * options.samples // grid.batch
    stops = {max(1, math.floor(place * total)): place for place in PLACES}
    noted = {0.0: (begun, 0)}
    before, given = asked.bytes, 0
    feed = open_feed(manifest, begun, options)
    for batch in feed:
        feed.commit(batch)
        given += 1
        if given in stops:
            noted[stops[given]] = (json.dumps(feed.synchronise().to_json()), asked.bytes - before)
    whole = asked.bytes - before
    window = 128 * options.columns * options.rows * (manifest.size / (options.shards * options.samples))
    print(f"{given} batches of {grid.batch}, {manifest.size / 1e6:.0f} MB, {grid.lanes} lanes, ", end="")
    print(f"blocks of {options.block >> 10} KiB; a window of all lanes is {window / 1e6:.1f} MB")
    print("place  first batch  read again   of all  in windows of all lanes    dropped  position")
    rows = []
    for place, (text, until) in noted.items():
        seconds = statistics.median(time_first(manifest, text, options) for _ in range(options.rounds))
        given_bytes = Position.from_json(json.loads(text)).trained_bytes
        again = rest(manifest, text, options, asked) - (whole - given_bytes) if place else 0
        dropped = until - given_bytes
        row = Row(place, seconds, again, again / manifest.size, again / window, dropped, len(text))
        print(
            f"{100 * place:4.0f}% {1000 * row.first_batch_seconds:9.0f} ms {row.again_bytes / 1e6:8.1f} MB "
            f"{100 * row.again_ratio:7.2f}% {row.windows:24.2f} {row.dropped_bytes / 1e6:7.1f} MB "
            f"{row.position_bytes:6} bytes",
            flush=True,
        )
        rows.append(row)
    return rows


def open_feed(manifest: Manifest, text: str, options: argparse.Namespace) -> Feed:
    """Make the feed from a position alone, as a restart does."""
    storage = StorageSection(block_bytes=options.block)
    return Feed(
        manifest,
        Position.from_json(json.loads(text)),
        settings=SETTINGS,
        reader=ShardReader(manifest, storage, read_ahead=2),
        crop=Undecoded(CropsSection(), seed=0),
        ranks=Ranks(),
    )


def time_first(manifest: Manifest, text: str, options: argparse.Namespace) -> float:
    """Seconds from the position to the first batch after it."""
    began = time.perf_counter()
    batches = iter(open_feed(manifest, text, options))
    next(batches)
    return time.perf_counter() - began


def rest(manifest: Manifest, text: str, options: argparse.Namespace, asked: Asked) -> int:
    """Bytes that are asked for from the position to the end."""
    before, feed = asked.bytes, open_feed(manifest, text, options)
    for batch in feed:
        feed.commit(batch)
    return asked.bytes - before


if __name__ == "__main__":
    raise SystemExit(main())
