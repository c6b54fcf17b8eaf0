"""`streamswav stream`: read and crop without training, to see whether the bucket or the CPU is the limit."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from streamswav.commands.undecoded import Undecoded
from streamswav.config import Config
from streamswav.defaults import known
from streamswav.drain import Drain
from streamswav.errors import ConfigError, StreamswavError
from streamswav.loader import Batch
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.position import Position
from streamswav.stream.store import Store, redact
from streamswav.telemetry.families import STAGES
from streamswav.training.distributed import Ranks
from streamswav.training.feed import Feed, Hooks
from streamswav.training.stream_loader import open_feed, resolve_stream

_BUSY = 0.85
_NOT_USED = ("quarantined", "excluded", "filtered")


@dataclass
class Report:
    """What was measured; all seconds are of the wall's clock but for `cpu_seconds`.

    Attributes:
        url: of the shards, the first one.
        shards, shard_bytes, shard_samples: of the manifest; samples only where the producers counted.
        workers: loader processes.
        cores: that this process can use.
        list_seconds: time to list the shards.
        first_batch_seconds: time from there to the first batch; processes start in it.
        seconds: time from the first batch to the last.
        samples: given, the first batch's too.
        samples_per_second, bytes_per_second: given since the first batch.
        sample_bytes: bytes in the shards of the samples given.
        received_bytes: over the network; None for local files, of which nothing is counted.
        read_ratio: bytes received over bytes given.
        requests: to the store, by outcome.
        stage_seconds: time of the loader processes by stage.
        stage_share: the same as shares of their sum.
        cpu_seconds: of the loader processes since the first batch; None where the system does not tell.
        cpu_seconds_per_sample: the same for one sample.
        main_busy_ratio: share of the time that this process, which takes the batches, was busy.
        not_used: samples that were not given, by outcome.
        reasons: why, by reason.
        damages: stretches of shards that could not be parsed.
        limit: what limits, and what to change.
    """

    url: str
    shards: int
    shard_bytes: int
    shard_samples: int | None
    workers: int
    cores: int
    list_seconds: float = 0.0
    first_batch_seconds: float | None = None
    seconds: float = 0.0
    samples: int = 0
    samples_per_second: float | None = None
    bytes_per_second: float | None = None
    sample_bytes: int = 0
    received_bytes: int | None = None
    read_ratio: float | None = None
    requests: dict[str, int] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_share: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float | None = None
    cpu_seconds_per_sample: float | None = None
    main_busy_ratio: float = 0.0
    not_used: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    damages: int = 0
    limit: str = ""


def stream(
    config: Config,
    drain: Drain,
    *,
    seconds: float,
    samples: int | None = None,
    crops: bool = True,
    as_json: bool = False,
) -> None:
    """Measure for a while and print the report; nothing is written anywhere.

    Args:
        config: its stream, storage, loader and crops, and training.batch.
        drain: ends it early, with the report so far.
        seconds: how long, from the first batch on; a bucket that gives none gets as long.
        samples: end after so many.
        crops: whether images are decoded and cropped.
        as_json: print JSON.

    Raises:
        ConfigError: there are no URLs, or something that cannot work.
        StreamswavError: as the data or the store deserve; what was measured until then is printed first.
    """
    if not config.stream.urls:
        raise ConfigError("stream.urls", "say where the shards are, as streamswav stream s3://bucket/shards/")
    for option, value in (("--seconds", seconds), ("--samples", samples)):
        if value is not None and value <= 0:
            raise ConfigError(option, "must be positive", value=value)
    began = time.perf_counter()
    manifest = list_manifest(config.stream.urls, Store(config.storage))
    listing = time.perf_counter() - began
    report, failure = measure(
        config,
        drain,
        manifest=manifest,
        seconds=seconds,
        samples=samples,
        crops=crops,
        list_seconds=listing,
        tell=sys.stderr.write,
    )
    if failure and not report.samples:
        raise failure
    text = json.dumps(asdict(report), indent=1) if as_json else describe(report)
    sys.stdout.write(text + "\n")
    if failure:
        raise failure


def measure(
    config: Config,
    drain: Drain,
    *,
    manifest: Manifest,
    seconds: float,
    samples: int | None = None,
    crops: bool = True,
    list_seconds: float = 0.0,
    patience: float | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[Report, StreamswavError | None]:
    """Read and crop for a while, and return what was measured, with the error that ended it, if one did.

    Args:
        config: as `stream`'s.
        drain: ends it early.
        manifest: the shards.
        seconds: how long, from the first batch on.
        samples: end after so many.
        crops: whether images are decoded and cropped.
        list_seconds: that the listing took.
        patience: how long the first batch may take; by default as long.
        tell: hears of the first batch, a line.

    Raises:
        ConfigError: something that cannot work.
    """
    began = time.perf_counter()
    config = resolve_stream(config, manifest, Ranks())
    report = _report(config, manifest)
    report.list_seconds = list_seconds + time.perf_counter() - began
    drain.patient = True
    meter = _Meter(
        report, until=seconds, patience=patience or seconds, samples=samples, drain=drain, tell=tell
    )
    feed = open_feed(
        config,
        manifest,
        Ranks(),
        crop=None if crops else Undecoded(config.crops, seed=0),
        hooks=Hooks(drain=meter.done),
    )
    failure = _run(feed, meter)
    if report.samples or not failure:
        _complete(report, feed.position, config)
    return report, failure


def describe(report: Report) -> str:
    """Return the report as lines for people, the closing one of which says what limits."""
    held = f", {report.shard_samples:,} samples" if report.shard_samples is not None else ""
    lines = [f"{report.url}: {report.shards:,} shards, {_size(report.shard_bytes)}{held}"]
    lines.append(f"start     listed in {report.list_seconds:.2f} s, {_first(report)}")
    lines.append(f"samples   {report.samples:,} in {report.seconds:.1f} s{_rates(report)}")
    if report.received_bytes is None:
        lines.append("received  local files: requests are not counted")
    else:
        outcomes = ", ".join(f"{name} {count:,}" for name, count in sorted(report.requests.items()))
        per_second = report.received_bytes / max(report.seconds, 1e-9)
        lines.append(
            f"received  {_size(report.received_bytes)}, {_size(per_second)}/s; requests: {outcomes}; "
            f"{report.read_ratio or 0:.2f} bytes read for one used"
        )
    if report.cpu_seconds_per_sample is not None and report.cpu_seconds is not None:
        lines.append(
            f"CPU       {1000 * report.cpu_seconds_per_sample:.3f} ms a sample, {report.cpu_seconds:.1f} s, "
            f"{report.workers or 'no'} loader processes on {report.cores} cores"
        )
    shares = (
        f"{name} {100 * report.stage_share.get(name, 0):.0f}% ({report.stage_seconds.get(name, 0):.1f} s)"
        for name in STAGES
    )
    lines.append(f"stages    {', '.join(shares)}")
    counts = ", ".join(f"{count:,} {name}" for name, count in report.not_used.items())
    reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(report.reasons.items()))
    lines.append(f"not used  {counts}, {report.damages:,} damages{f'; {reasons}' if reasons else ''}")
    return "\n".join([*lines, report.limit])


class _Meter:
    """Adds up batches, and knows when it is enough."""

    def __init__(
        self,
        report: Report,
        *,
        until: float,
        patience: float,
        samples: int | None,
        drain: Callable[[], bool],
        tell: Callable[[str], object],
    ) -> None:
        self._report, self._until, self._samples, self._drain = report, until, samples, drain
        self._patience, self._tell = patience, tell
        self._began = time.perf_counter()
        self._first: float | None = None
        self._first_samples = self._first_bytes = 0
        self._traffic = Counter[str]()
        self._received = 0
        self._stages = Counter[str]()
        self._cpu: float | None = None
        self._own = 0.0

    def done(self) -> bool:
        """Tell whether to stop."""
        enough = self._samples is not None and self._report.samples >= self._samples
        if self._first is None:
            over = time.perf_counter() - self._began >= self._patience
        else:
            over = time.perf_counter() - self._first >= self._until
        return enough or over or self._drain()

    def add(self, batch: Batch) -> None:
        """Count a batch that has just come."""
        now, report = time.perf_counter(), self._report
        report.samples += len(batch.ids)
        report.sample_bytes += batch.sample_bytes
        self._stages.update(batch.seconds)
        for outcome, received in batch.traffic:
            self._traffic[outcome] += 1
            self._received += received
        if self._first is None:
            self._first, self._own = now, time.process_time()
            self._cpu = _loader_seconds(report.workers)
            self._first_samples, self._first_bytes = report.samples, report.sample_bytes
            report.first_batch_seconds = now - self._began
            self._tell(f"streamswav: {_first(report)}; measuring for {self._until:g} s, Ctrl-C ends it\n")
        report.seconds = now - self._first

    def close(self) -> None:
        """Work out what follows from the sums."""
        report = self._report
        report.stage_seconds = {name: self._stages[name] for name in STAGES}
        whole = self._stages.total()
        report.stage_share = {name: self._stages[name] / whole if whole else 0.0 for name in STAGES}
        report.requests = dict(self._traffic)
        if self._traffic:
            report.received_bytes = self._received
            report.read_ratio = self._received / report.sample_bytes if report.sample_bytes else None
        if report.seconds > 0:
            report.samples_per_second = (report.samples - self._first_samples) / report.seconds
            report.bytes_per_second = (report.sample_bytes - self._first_bytes) / report.seconds
            report.main_busy_ratio = (time.process_time() - self._own) / report.seconds
        spent, samples = _loader_seconds(report.workers), report.samples - self._first_samples
        if spent is not None and self._cpu is not None and samples:
            report.cpu_seconds = spent - self._cpu
            report.cpu_seconds_per_sample = report.cpu_seconds / samples


def _run(feed: Feed, meter: _Meter) -> StreamswavError | None:
    """Take batches until it is enough; return the error that ended it, if one did."""
    failure = None
    try:
        for batch in feed:
            feed.commit(batch)
            meter.add(batch)
            del feed.unwritten[:-3]
    except StreamswavError as error:
        failure = error
    finally:
        meter.close()
    feed.synchronise()
    return failure


def _report(config: Config, manifest: Manifest) -> Report:
    return Report(
        url=redact(config.stream.urls[0]),
        shards=len(manifest.shards),
        shard_bytes=manifest.size,
        shard_samples=manifest.samples,
        workers=known(config.loader.workers),
        cores=len(os.sched_getaffinity(0)),
    )


def _complete(report: Report, position: Position, config: Config) -> None:
    report.not_used = {outcome: position.total(outcome).samples for outcome in _NOT_USED}
    report.reasons = dict(position.reasons)
    report.damages = len(position.damages)
    report.limit = name_limit(report, config)


def name_limit(report: Report, config: Config) -> str:
    """Say what limits, from the shares of the stages and how busy the cores are, and what would help."""
    if not report.samples:
        return "limited by the bucket: not one batch came in time; look at the requests, or give --seconds"
    processes = max(1, report.workers)
    busy = (report.cpu_seconds or 0.0) / (report.seconds or 1.0)
    stage = max(report.stage_share, key=lambda name: report.stage_share[name])
    share = f"{100 * report.stage_share[stage]:.0f}% of the loader processes' time"
    full = busy >= _BUSY * report.cores
    workers = f"raise loader.workers (now {report.workers}; {busy:.1f} of {report.cores} cores are busy)"
    if report.workers and report.main_busy_ratio >= _BUSY:
        return "limited by this process, which takes the batches: in training, use more ranks"
    if stage == "fetch":
        return f"limited by {_bucket(report, config)}; it takes {share}"
    remedy = "add cores" if full or processes >= report.cores else workers
    names = {
        "parse": "reading tars and conditions",
        "decode": "decoding",
        "crop": "cutting and resizing crops",
        "collate": "stacking crops to batches",
    }
    return f"limited by {names[stage]}: {remedy}; it takes {share}"


def _bucket(report: Report, config: Config) -> str:
    if report.received_bytes is None:
        return "the disk: use a faster one, or raise loader.workers"
    throttled = report.requests.get("throttled", 0)
    if throttled:
        return f"the bucket, which throttled {throttled:,} requests: spread shards over more prefixes"
    loader = config.loader
    return (
        f"the bucket: raise loader.requests (now {loader.requests}), loader.read_ahead (now "
        f"{loader.read_ahead}) or loader.workers (now {report.workers}), or come closer to it"
    )


def _first(report: Report) -> str:
    if report.first_batch_seconds is None:
        return "no batch came"
    return f"first batch {report.first_batch_seconds:.2f} s later"


def _rates(report: Report) -> str:
    if report.samples_per_second is None or report.bytes_per_second is None:
        return ""
    return f": {report.samples_per_second:,.1f} a second, {_size(report.bytes_per_second)}/s"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _loader_seconds(workers: int) -> float | None:
    """CPU seconds of the loader processes so far, those that are over too; None where nobody tells.

    They are the children of the fork server, which is one of ours; it adds up those that have ended.
    """
    if workers == 0:
        return time.process_time()
    ticks, here = os.sysconf("SC_CLK_TCK"), os.getpid()
    spent: dict[int, tuple[int, int, int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        own, ended = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
        spent[int(file.parent.name)] = (int(fields[1]), own, ended)
    if here not in spent:
        return None
    children = {pid for pid, (parent, _, _) in spent.items() if parent == here}
    total = sum(spent[pid][2] for pid in children)
    total += sum(own + ended for parent, own, ended in spent.values() if parent in children)
    return total / ticks
