"""A run that is killed again and again, on bad data and bad storage: is every sample accounted for?

    .venv/bin/python ops/benchmarks/chaos.py
    .venv/bin/python ops/benchmarks/chaos.py --seed 7 --rounds 40 --minutes 20 --dividing --json chaos.json

A real S3 server (rclone) behind a proxy that injects faults; shards of which some are cut, broken, garbage or
redacted, with samples that are excluded or filtered; real processes on 1 to 4 ranks with 0 to 2 loader
workers each, killed with -9 at random moments, the number of both changed at each restart. An undisturbed run
goes over the same data. At the end `streamswav audit --recount` must balance for both, every outcome but
trained and left must have the same digest, and digest(trained) + digest(left) must be equal; with
`--dividing` only ranks and workers are drawn that divide the lane grid, and both must be equal alone.

Exit code 0: all of this holds. 1: something does not, and the folder is kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from shards import cli as shards_cli

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]

from fault_proxy import FaultProxy, Rates  # noqa: E402 - these two lie beside the code, not in the package
from runs import Running, arguments, free_port, start_ranks  # noqa: E402

BATCH = 16
DIVIDING = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (4, 0)]
OTHERS = [(3, 0), (3, 1), (2, 3)]
RATES = Rates(reset=0.03, stall=0.003, truncate=0.02, slowdown=0.01, error=0.02)
KEYS = ("STREAMSWAVCHAOS", "streamswav-chaos")
LOSSY = {"stream.skip_ratio": "0.5", "stream.where": "json.width >= 100"}


@dataclasses.dataclass(frozen=True)
class Bucket:
    """What is trained, and where.

    Attributes:
        endpoint: of the server itself.
        folder: behind it.
        passes: over all shards.
        steps: about how many batches a run takes.
    """

    endpoint: str
    folder: Path
    passes: int
    steps: int

    def command(self, run: str, endpoint: str, workers: int) -> list[str]:
        """Arguments of `pretrain` for one start."""
        given = arguments(
            run={"directory": f"s3://chaos/{run}"},
            stream={
                "urls": "s3://chaos/shards/",
                "passes": self.passes,
                "columns": 4,
                "rows": 2,
                "window": 8,
            },
            storage={"endpoint_url": endpoint, "timeout_seconds": 3, "block_bytes": 1 << 16},
            loader={"workers": workers},
            checkpoint={"images": 2 * BATCH},
        )
        lossy = {**LOSSY, "stream.exclude": "s3://chaos/optouts.txt"}
        return [*given, *(part for key, text in lossy.items() for part in (f"--{key}", text))]


def main() -> int:
    options = parse()
    os.environ.update(
        AWS_ACCESS_KEY_ID=KEYS[0],
        AWS_SECRET_ACCESS_KEY=KEYS[1],
        AWS_EC2_METADATA_DISABLED="true",
        PYTHONWARNINGS="ignore:resource_tracker",  # killed processes leave semaphores behind
    )
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    dice = random.Random(options.seed)
    with serve(folder) as endpoint:
        samples = build(folder / "data" / "chaos", options.shards, dice)
        steps = samples * options.passes // BATCH
        bucket = Bucket(endpoint, folder / "data" / "chaos", options.passes, steps)
        finish(bucket, "calm", endpoint, folder / "calm", [(1, 1)], dice=dice)
        with FaultProxy(endpoint, seed=options.seed, rates=RATES, stall_seconds=4) as proxy:
            report = disturb(bucket, proxy, folder / "logs", options, dice)
            report["injected"] = dict(proxy.injected)
        report |= compare(bucket, dividing=options.dividing)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["differences"]:
        print(f"kept: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, faults, kills and topologies")
    parser.add_argument("--rounds", type=int, default=20, help="kills")
    parser.add_argument("--minutes", type=float, default=10, help="no kills after that; the run then ends")
    parser.add_argument("--passes", type=int, default=2, help="over the shards")
    parser.add_argument("--shards", type=int, default=36)
    parser.add_argument("--dividing", action="store_true", help="only ranks and workers that divide the grid")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    return parser.parse_args()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run an S3 server with signatures; yields its address."""
    (folder / "data" / "chaos").mkdir(parents=True)
    beside, port = Path(sys.executable).with_name("rclone"), free_port()
    binary = str(beside) if beside.exists() else "rclone"
    command = [binary, "serve", "s3", "--auth-key", ",".join(KEYS), "--addr", f"127.0.0.1:{port}"]
    command += ["--vfs-cache-mode", "off", "--dir-cache-time", "1ms", str(folder / "data")]
    with (folder / "rclone.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            time.sleep(1)
            if process.poll() is not None:
                sys.exit(f"rclone ended: {(folder / 'rclone.log').read_text()}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def build(folder: Path, count_of_shards: int, dice: random.Random) -> int:
    """Write the shards, some of them damaged, and the opt-outs; return the number of samples."""
    shards, samples = folder / "shards", 0
    shards.mkdir()
    for shard in range(count_of_shards):
        count = dice.choice([0, 1, 7, 40, 60, 80, 160])
        samples += count
        write_shard(shards / f"part-{shard:03d}.tar", shard, count, dice)
    paths = sorted(shards.glob("*.tar"), key=lambda path: path.stat().st_size)
    for damage, path in zip((cut, cut_on_a_boundary, break_headers, overwrite), paths[-8:], strict=False):
        damage(path, dice)
    (shards / "part-900.tar").write_bytes(dice.randbytes(20_000))
    optouts = [f"{shard}_{number}" for shard in range(count_of_shards) for number in range(3, 160, 31)]
    (folder / "optouts.txt").write_text("\n".join(optouts) + "\n")
    redacted = [part for number in range(0, count_of_shards, 9) for part in ("--key", f"{number}_0")]
    shards_cli.main(["redact", str(shards), *redacted])  # it exits with 1 where a shard has no such sample
    return samples


def write_shard(path: Path, shard: int, count: int, dice: random.Random) -> None:
    """One in 40 images is broken, one in 60 is missing, one sidecar in 10 does not meet the condition."""
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for number in range(count):
            image = picture(dice)
            sample: dict[str, Any] = {
                "__key__": f"{shard}_{number}",
                "json": {"width": dice.choice([50] + 9 * [500])},
            }
            if dice.random() > 1 / 60:
                sample["jpg"] = image if dice.random() > 1 / 40 else image[: len(image) // 2]
            writer.write(sample)


def picture(dice: random.Random) -> bytes:
    pixels = np.frombuffer(dice.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((dice.randint(24, 64), 48)).save(data, "JPEG")
    return data.getvalue()


def cut(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randint(path.stat().st_size // 3, path.stat().st_size - 5000))


def cut_on_a_boundary(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randint(20, path.stat().st_size // 512 - 20) * 512)


def break_headers(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    places = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for at in dice.sample(places, min(5, len(places))):
        data[at + 148 : at + 156] = b"7777777\0"
    path.write_bytes(data)


def overwrite(path: Path, dice: random.Random) -> None:
    data, at = bytearray(path.read_bytes()), dice.randint(2000, path.stat().st_size - 9000)
    data[at : at + 3000] = dice.randbytes(3000)
    path.write_bytes(data)


def disturb(
    bucket: Bucket, proxy: FaultProxy, logs: Path, options: argparse.Namespace, dice: random.Random
) -> dict[str, Any]:
    """Start and kill the run, and let it end."""
    topologies = DIVIDING if options.dividing else DIVIDING + OTHERS
    deadline, began, kills = time.monotonic() + 60 * options.minutes, time.monotonic(), 0
    used: collections.Counter[str] = collections.Counter()
    code = None
    while kills < options.rounds and time.monotonic() < deadline and code != 0:
        # Before its first checkpoint a run is new, and a new run needs ranks that divide its batch.
        begun = (bucket.folder / "run" / "checkpoints" / "latest").exists()
        ranks, workers = dice.choice(topologies if begun else DIVIDING)
        command = bucket.command("run", proxy.url, workers)
        with start_ranks(ranks, command, logs / f"{kills:03d}") as running:
            code = kill_at_random(running, 1.6 * bucket.steps / options.rounds, dice)
        if code not in (None, 0, 75):
            sys.exit(f"a start ended by itself with {code}: {running.so_far().said[-3:]}")
        used[f"{ranks} ranks x {workers} workers"] += 1
        kills += code is None
        print(
            f"{kills} kills, {ranks} ranks x {workers} workers, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
        )
    starts = finish(bucket, "run", proxy.url, logs / "last", topologies, dice=dice)
    seconds = round(time.monotonic() - began)
    return {
        "seed": options.seed,
        "kills": kills,
        "starts": starts + sum(used.values()),
        "seconds": seconds,
        "topologies": used,
    }


def kill_at_random(running: Running, steps: float, dice: random.Random) -> int | None:
    """Kill a run in its start, or some steps on: all of it, or one process; its code if it ended before."""
    if dice.random() < 0.2:
        goal, patience = 0, dice.uniform(0, 5)
    else:
        goal, patience = dice.randint(1, max(1, round(steps))), 90.0
    until, first = time.monotonic() + patience, None
    while time.monotonic() < until and not running.ended:
        done = [event["step"] for event in running.so_far().of("progress")]
        if done and goal:
            first = done[0] if first is None else first
            if done[-1] - first >= goal:
                break
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.2))
    if running.ended:
        return running.so_far().code
    members = running.members()
    if members and dice.random() < 0.3:
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(members).pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while time.monotonic() < until and not running.ended:
            time.sleep(0.05)
    running.kill()
    return None


def finish(
    bucket: Bucket,
    run: str,
    endpoint: str,
    logs: Path,
    topologies: Sequence[tuple[int, int]],
    *,
    dice: random.Random,
) -> int:
    """Start a run until it ends; return how often."""
    for attempt in range(1, 10):
        ranks, workers = dice.choice(topologies)
        with start_ranks(ranks, bucket.command(run, endpoint, workers), logs / f"{attempt}") as running:
            outcome = running.wait(600)
        if outcome.code == 0:
            return attempt
        if outcome.code != 75:
            sys.exit(f"the run {run} ended with {outcome.code}: {outcome.said[-3:]}")
    sys.exit(f"the run {run} does not end")


def compare(bucket: Bucket, *, dividing: bool) -> dict[str, Any]:
    """Audit both runs, and name what differs."""
    calm, run = (audit(bucket, name) for name in ("calm", "run"))
    differences = [f"the audit of {each['name']} does not balance" for each in (calm, run) if each["code"]]
    for outcome in ("excluded", "filtered", "quarantined"):
        if calm[outcome] != run[outcome]:
            differences.append(f"{outcome}: {run[outcome]}, undisturbed {calm[outcome]}")
    if added(calm) != added(run):
        differences.append(f"trained + left: {added(run)}, undisturbed {added(calm)}")
    if dividing and calm["trained"] != run["trained"]:
        differences.append(f"trained: {run['trained']}, undisturbed {calm['trained']}")
    return {"undisturbed": calm, "disturbed": run, "differences": differences}


def added(audited: dict[str, Any]) -> list[Any]:
    """Samples, bytes and digest of what was trained or is left."""
    one, other = audited["trained"], audited["left"]
    digest = (int(one[2], 16) + int(other[2], 16)) % (1 << 64)
    return [one[0] + other[0], one[1] + other[1], f"{digest:016x}"]


def audit(bucket: Bucket, run: str) -> dict[str, Any]:
    """What `streamswav audit --recount` says: samples, bytes and digest by outcome."""
    command = [sys.executable, "-m", "streamswav", "audit", f"s3://chaos/{run}", "--recount", "--json"]
    command += ["--storage.endpoint_url", bucket.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(f"the audit of {run} ended with {done.returncode}: {done.stderr[-2000:]}")
    said = json.loads(done.stdout)
    rows = {row["outcome"]: [row["samples"], row["bytes"], row["digest"]] for row in said["rows"]}
    nothing = [0, 0, "0" * 16]
    outcomes = ("trained", "left", "excluded", "filtered", "quarantined")
    return {"name": run, "code": done.returncode, **{name: rows.get(name, nothing) for name in outcomes}}


if __name__ == "__main__":
    sys.exit(main())
