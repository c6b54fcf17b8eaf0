"""CPU time of a sample: our stream beside a plain webdataset pipeline, on the same local shards.

    .venv/bin/python ops/benchmarks/stream.py
    .venv/bin/python ops/benchmarks/stream.py --shards FOLDER --crops --json stream.json

Both run in this process on one core, turn by turn, each over all shards once, and hand out the bytes of every
image. Ours shuffles in windows, checks every byte of the archives and keeps a position after each sample; the
other does neither, unless it is given a shuffle buffer. What counts is the process' time (user and system,
threads too), as the median over the rounds. `--crops` adds decoding and cropping as loader processes do it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import webdataset
from crops import photograph
from machine import machine

from streamswav.config import CropsSection
from streamswav.crops import MultiCrop
from streamswav.stream import open_stream

Read = Callable[[], Iterator[bytes]]

TINY = 1 << 10


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the collector
    with tempfile.TemporaryDirectory() as made:
        folders = (
            {"given": options.shards}
            if options.shards
            else {
                "photographs": build(Path(made, "photographs"), photographs()),
                "thumbnails": build(Path(made, "thumbnails"), [os.urandom(TINY)], shards=4, samples=5000),
            }
        )
        results = [row for name, folder in folders.items() for row in measure(name, folder, options)]
    if options.json:
        summary = {"machine": machine("webdataset"), "rounds": options.rounds, "results": results}
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, help="folder of tars; by default two are made")
    parser.add_argument(
        "--crops", action="store_true", help="measure decoding and cropping too (JPEGs alone)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is measured")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def measure(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """Microseconds of CPU a sample of each way to read the folder, in turns."""
    ways: dict[str, Read] = {
        "webdataset": lambda: theirs(folder),
        "webdataset, shuffle(128)": lambda: theirs(folder, shuffle=128),
        "streamswav": lambda: ours(folder),
        "streamswav, window 1": lambda: ours(folder, window=1),
    }
    if options.crops and name != "thumbnails":
        ways["streamswav and crops"] = lambda: ours(folder, crop=MultiCrop(CropsSection(), seed=0))
    spent: dict[str, list[float]] = {way: [] for way in ways}
    counts = set()
    for _, (way, read) in itertools.product(range(options.rounds + 1), ways.items()):
        began = time.process_time()
        samples, size = drain(read())
        spent[way].append((time.process_time() - began) / samples)
        counts.add((samples, size))
    assert len(counts) == 1, "all read the same samples"
    (samples, size) = counts.pop()
    print(f"{name}: {samples} samples of {size / samples / 1000:.1f} kB")
    # The first round warms up caches and allocators.
    medians = {way: statistics.median(times[1:]) for way, times in spent.items()}
    rows = []
    for way, seconds in medians.items():
        ratio = medians["webdataset"] / seconds
        print(f"  {way:26} {1e6 * seconds:9.1f} us of CPU a sample   {ratio:5.2f}x")
        rows.append({"images": name, "way": way, "microseconds": 1e6 * seconds, "ratio": ratio})
    return rows


def drain(images: Iterable[bytes]) -> tuple[int, int]:
    """Count the images and their bytes."""
    samples = size = 0
    for image in images:
        samples, size = samples + 1, size + len(image)
    return samples, size


def theirs(folder: Path, *, shuffle: int = 0) -> Iterator[bytes]:
    """The images by webdataset's own reader."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls) if shuffle else False)
    if shuffle:
        pipeline = pipeline.shuffle(shuffle)
    return (sample["jpg"] for sample in pipeline)


def ours(folder: Path, *, window: int = 128, crop: MultiCrop | None = None) -> Iterator[bytes]:
    """The images by our stream, cropped on the way where that is asked for."""
    for sample in open_stream(folder, window=window):
        assert sample.image is not None
        if crop is not None:
            crop(sample.image, key=(0, sample.id.shard, sample.id.ordinal))
        yield sample.image


def photographs() -> list[bytes]:
    return [photograph(375, 500, seed) for seed in range(32)]


def build(folder: Path, images: list[bytes], *, shards: int = 4, samples: int = 500) -> Path:
    """Write shards of image, label and description, as webdataset does."""
    folder.mkdir()
    turns = itertools.cycle(images)
    for shard in range(shards):
        with (folder / f"{shard:05d}.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
            for index in range(samples):
                about = {"width": 500, "height": 375}
                writer.write(
                    {"__key__": f"{shard:05d}{index:05d}", "jpg": next(turns), "cls": 0, "json": about}
                )
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
