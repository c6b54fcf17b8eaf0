"""Decoding, cropping and augmenting on one core: the paper's pipeline and ours, side by side.

    .venv/bin/python ops/benchmarks/crops.py
    .venv/bin/python ops/benchmarks/crops.py --images FOLDER --json crops.json

The paper's pipeline decodes with Pillow and sends each crop through torchvision's transforms, one by one.
Both run in this process, on one thread pinned to one core, turn by turn; what counts is the core's time
(not the wall's, so that a neighbour disturbs less), as the median over the rounds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from machine import machine
from PIL import Image, ImageFilter
from torchvision import transforms

from streamswav.config import CropsSection
from streamswav.crops import Augment, MultiCrop, collate

PHOTOS = CropsSection()
TINY = CropsSection(sizes=[28, 16], counts=[2, 4])
BATCHES = {"photos": 32, "tiny": 256}

Pipeline = Callable[[Sequence[bytes]], object]


def main() -> int:
    options = parse()
    pin_to_one_core()
    photos = read_folder(options.images) if options.images else [photograph(375, 500, i) for i in range(64)]
    tiny = [thumbnail(image) for image in itertools.islice(itertools.cycle(photos), 512)]
    results = [
        *measure("photos", photos, PHOTOS, rounds=options.rounds),
        *measure("tiny", tiny, TINY, rounds=options.rounds),
    ]
    report(results)
    if options.json:
        summary = {"machine": machine("torch", "torchvision"), "rounds": options.rounds, "results": results}
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; by default 64 synthetic photographs")
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is measured")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def pin_to_one_core() -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(name: str, images: list[bytes], section: CropsSection, *, rounds: int) -> list[dict[str, object]]:
    """Images a second of one core, by stage, for both pipelines."""
    stages: dict[str, tuple[Pipeline, Pipeline]] = {
        "decode and crop": (paper_pipeline(section, augment=False), our_crops(section)),
        "whole": (paper_pipeline(section, augment=True), our_pipeline(section, batch=BATCHES[name])),
    }
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds + 1):
        for (stage, pipelines), side in itertools.product(stages.items(), (0, 1)):
            started = time.process_time()
            pipelines[side](images)
            rates.setdefault((stage, side), []).append(len(images) / (time.process_time() - started))
    return [
        {
            "images": name,
            "crops": " + ".join(f"{n}x{s}" for n, s in zip(section.counts, section.sizes, strict=True)),
            "stage": stage,
            # The first round warms up caches and allocators.
            "pillow_and_torchvision": statistics.median(rates[stage, 0][1:]),
            "streamswav": statistics.median(rates[stage, 1][1:]),
        }
        for stage in stages
    ]


def paper_pipeline(section: CropsSection, *, augment: bool) -> Pipeline:
    """One torchvision composition a resolution, applied once for each crop."""
    colours = (section.brightness, section.contrast, section.saturation, section.hue)
    after = [
        transforms.RandomHorizontalFlip(section.flip),
        transforms.RandomApply([transforms.ColorJitter(*colours)], p=section.jitter),
        transforms.RandomGrayscale(section.grayscale),
        transforms.RandomApply([PillowBlur(*section.blur_sigma)], p=section.blur),
        transforms.ToTensor(),
        transforms.Normalize(section.mean, section.std),
    ]
    resolutions = [
        (count, transforms.Compose([crop, *after]) if augment else crop)
        for size, count, scale in zip(section.sizes, section.counts, section.scales, strict=True)
        for crop in [transforms.RandomResizedCrop(size, scale=scale, ratio=section.aspect)]
    ]

    def run(images: Sequence[bytes]) -> None:
        for data in images:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for count, transform in resolutions:
                for _ in range(count):
                    transform(image)

    return run


class PillowBlur:
    """Gaussian blur of the paper: Pillow's, with a radius drawn uniformly."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self._low, self._high)))


def our_crops(section: CropsSection) -> Pipeline:
    multicrop = MultiCrop(section, seed=0)

    def run(images: Sequence[bytes]) -> None:
        for ordinal, image in enumerate(images):
            multicrop(image, key=(0, 0, ordinal))

    return run


def our_pipeline(section: CropsSection, *, batch: int) -> Pipeline:
    multicrop, augment = MultiCrop(section, seed=0), Augment(section)

    def run(images: Sequence[bytes]) -> None:
        for start in range(0, len(images), batch):
            part = enumerate(images[start : start + batch], start)
            pixels, parameters = collate([multicrop(image, key=(0, 0, ordinal)) for ordinal, image in part])
            for resolution, rows in zip(pixels, parameters.split(section.counts), strict=True):
                augment(resolution, rows)

    return run


def read_folder(folder: Path) -> list[bytes]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"{folder}: no JPEG files")
    return [path.read_bytes() for path in files]


def photograph(height: int, width: int, seed: int) -> bytes:
    """Noise at every scale, the coarse stronger, as a JPEG of about 100 kB at 500 x 375."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in 2 ** np.arange(1, 10):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        octave = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        total += (octave - 127.5) / cells**0.3
    buffer = io.BytesIO()
    Image.fromarray(np.clip(128 + total, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def thumbnail(image: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").resize((28, 28)).save(buffer, "PNG")
    return buffer.getvalue()


def report(results: list[dict[str, object]]) -> None:
    print(
        f"{'images':8} {'crops':14} {'stage':16} {'paper':>10} {'streamswav':>10}   images a second, one core"
    )
    for row in results:
        paper, ours = float(str(row["pillow_and_torchvision"])), float(str(row["streamswav"]))
        where = f"{row['images']:8} {row['crops']:14} {row['stage']:16}"
        print(f"{where} {paper:10.1f} {ours:10.1f}   {ours / paper:.1f}x")


if __name__ == "__main__":
    raise SystemExit(main())
