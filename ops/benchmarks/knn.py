"""Peak memory and time of kNN at the size of ImageNet, on random features.

    .venv/bin/python ops/benchmarks/knn.py
    .venv/bin/python ops/benchmarks/knn.py --train 1281167 --test 50000 --dim 2048 --json knn.json
    .venv/bin/python ops/benchmarks/knn.py --train 1281167 --test 2000 --dim 2048 --half

Features are drawn, not extracted: what is measured is the search and the votes, by the code of `streamswav
knn`. "Held" is what the features take; the peak is the kernel's (VmHWM) over what the process held before
they were drawn. The time of fewer test images than 50,000 is also scaled to 50,000: each is multiplied
with all training images, and what is done once a round of test images (bringing the training features to
unit length) is scaled with it, so the figure is rather too high.

`--against-plain` also runs what one would write without thinking of memory or ties, the whole product and
`topk`, where it fits, and compares neighbours and time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch
from machine import machine
from torch import Tensor
from torch.nn import functional as F

from streamswav.transfer.measuring.knn import KnnSettings, measure_knn
from streamswav.transfer.measuring.neighbours import find_neighbours

MiB = 1 << 20
VALIDATION = 50_000
CLASSES = 1000
_DRAWN_AT_ONCE = 8192


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    row = measure(options)
    print(describe(row))
    if options.against_plain:
        row["plain"] = against_plain(options)
        print(
            f"plain torch, {row['plain']['train']:,} x {row['plain']['test']:,}: "
            f"{row['plain']['seconds']:.2f} s, ours {row['plain']['own_seconds']:.2f} s, "
            f"the same neighbours: {row['plain']['same']:.4%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("torch"), **row}, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=int, default=100_000, help="training images")
    add("--test", type=int, default=2_000, help="test images")
    add("--dim", type=int, default=2048, help="features of an image")
    add("--k", type=int, nargs="+", default=[20, 200], help="neighbours that vote")
    add("--half", action="store_true", help="hold the training features in float16")
    add("--device", default="cpu", help="where similarities are computed")
    add("--threads", type=int, default=0, help="of torch (default: its own choice)")
    add("--against-plain", action="store_true", help="compare with the whole product and topk")
    add("--json", type=Path, help="file for the results")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Draw features, search, vote."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base = status("VmRSS")
    train = draw(options.train, options.dim, seed=1, dtype=torch.float16 if options.half else torch.float32)
    test = draw(options.test, options.dim, seed=2)
    generator = torch.Generator().manual_seed(3)
    labels = [
        torch.randint(CLASSES, (count,), generator=generator) for count in (options.train, options.test)
    ]
    held = train.nbytes + test.nbytes
    blocks = [0]
    began = time.perf_counter()
    found = measure_knn(
        train,
        labels[0],
        test,
        labels[1],
        classes=CLASSES,
        settings=KnnSettings(tuple(options.k)),
        device=options.device,
        alive=lambda: tell(blocks, began),
    )
    seconds = time.perf_counter() - began
    flops = 2.0 * options.train * options.test * options.dim
    return {
        "train": options.train,
        "test": options.test,
        "features": options.dim,
        "half": options.half,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "seconds_for_50000": seconds * VALIDATION / options.test,
        "gigaflops_a_second": flops / seconds / 1e9,
        "held_mib": held / MiB,
        "peak_mib": (status("VmHWM") - base) / MiB,
        "top1": next(iter(found.values())).scores["top1"],
    }


def against_plain(options: argparse.Namespace) -> dict[str, float]:
    """Search as one would without thinking of memory, on at most 100,000 x 2,000 images."""
    count, asked = min(options.train, 100_000), min(options.test, 2_000)
    train, test = draw(count, options.dim, seed=1), draw(asked, options.dim, seed=2)
    k = max(options.k)
    began = time.perf_counter()
    expected = (F.normalize(test) @ F.normalize(train).T).topk(k)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    similarities, rows = find_neighbours(test, train, k)
    own_seconds = time.perf_counter() - began
    assert torch.allclose(similarities, expected.values, atol=1e-5)
    return {
        "train": count,
        "test": asked,
        "seconds": seconds,
        "own_seconds": own_seconds,
        "same": (rows == expected.indices).double().mean().item(),
    }


def draw(rows: int, features: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random features [N, F], as after a ReLU, drawn in parts."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(rows, features, dtype=dtype)
    for part in torch.split(drawn, _DRAWN_AT_ONCE):
        part.copy_(torch.randn(part.shape, generator=generator).relu_())
    return drawn


def tell(blocks: list[int], began: float) -> None:
    """Say now and then that it goes on."""
    blocks[0] += 1
    if blocks[0] >= 64 and blocks[0] & (blocks[0] - 1) == 0:
        sys.stderr.write(
            f"{blocks[0]:,} blocks of 1024 x 32768 similarities, {time.perf_counter() - began:.0f} s\n"
        )


def describe(row: dict[str, float]) -> str:
    """One line."""
    return (
        f"{row['train']:,} x {row['test']:,} images of {row['features']:,} features"
        f"{' (training in float16)' if row['half'] else ''}: {row['seconds']:.1f} s "
        f"({row['gigaflops_a_second']:.0f} GFLOP/s, {row['threads']} threads; "
        f"50,000 test images: {row['seconds_for_50000']:.0f} s); "
        f"features hold {row['held_mib']:.0f} MiB, peak {row['peak_mib']:.0f} MiB"
    )


def status(name: str) -> int:
    """A size of this process in bytes, as the kernel tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(main())
