"""The folder of a run: what it began with, and what may not be another on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import yaml

from streamswav.config import Config, parse_config
from streamswav.errors import ConfigError, PositionError, StreamswavError
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import Manifest, Shard, list_manifest
from streamswav.stream.redaction import newest_version
from streamswav.stream.store import Store, join, leaving_no_empty_folder, redact
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Reporter
from streamswav.training.checkpoint import CheckpointFolder
from streamswav.training.distributed import Ranks
from streamswav.training.lease import Lease
from streamswav.training.mirror import Mirror

MANIFEST_FILE = "manifest.json"
LEFT_FILE = "left.jsonl"
KINDS = {"pretrain": "pretraining", "finetune": "finetuning"}
_SHOWN = 3


@dataclass(frozen=True)
class Run:
    """What all parts of a run share once it has started."""

    config: Config
    manifest: Manifest
    ranks: Ranks
    store: Store
    reporter: Reporter
    metrics: Metrics
    lease: Lease


def freeze_manifest(config: Config, store: Store, reporter: Reporter, *, begun: bool) -> Manifest:
    """List the shards; a run that has begun keeps to the list it began with, and what joined it.

    Raises:
        PositionError: more shards of the run's list are gone or were changed than its budget allows.
    """
    listed = list_manifest(config.stream.urls, store)
    place = join(config.run.directory, MANIFEST_FILE)
    if not begun or not store.exists(place):
        store.write(place, json.dumps(listed.to_json()).encode())
        return listed
    frozen = Manifest.from_json(json.loads(store.read(place)))
    there = {shard.key: shard for shard in listed.shards}
    lost = [(shard, reason) for shard in frozen.shards if (reason := _differs(shard, there, store))]
    if not config.stream.follow:  # there shards expire; what was left of them is found out by reading
        _refuse_lost(lost, frozen, config, place)
    for shard, reason in lost[:_SHOWN]:
        reporter.event("warning", f"{shard.key} {reason}: what is left of it is quarantined")
    known = {shard.key for shard in frozen.shards}
    new = sum(shard.key not in known for shard in listed.shards)
    if new and not config.stream.follow:
        reporter.event(
            "new_shards",
            f"{new} shards came after the run began: they are left for another run, or for stream.follow",
        )
    # Content may have moved as a whole, so today's URLs and versions hold for the shards of then.
    gone = {shard.key for shard, _ in lost}
    shards = tuple(shard if shard.key in gone else there[shard.key] for shard in frozen.shards)
    return replace(frozen, shards=shards)


def _refuse_lost(lost: Sequence[tuple[Shard, str]], frozen: Manifest, config: Config, place: str) -> None:
    """Hold shards that are gone before they are met to the budget for those met on the way."""
    size = sum(shard.size for shard, _ in lost)
    if size <= config.stream.shard_ratio * frozen.size:
        return
    shown = "; ".join(f"shard {shard.key} {reason}" for shard, reason in lost[:_SHOWN])
    raise PositionError(
        f"{redact(place)}: {shown} ({len(lost)} of this run's {len(frozen.shards)} shards below stream.urls, "
        f"more than stream.shard_ratio = {config.stream.shard_ratio} of its bytes); bring them back, or "
        "choose another run.directory for other data"
    )


def _differs(frozen: Shard, there: Mapping[str, Shard], store: Store) -> str:
    """Say how a shard is no longer the run's; its version tells only where it has not moved."""
    found = there.get(frozen.key)
    if found is None:
        return "is gone"
    if found.size != frozen.size:
        return "has another size"
    if redact(found.url) != frozen.url or found.version == frozen.version:
        return ""
    return "" if newest_version(store, found.url, frozen.version) == found.version else "was replaced"


def read_begun(config: Config, store: Store) -> Config | None:
    """Read what was chosen when the run began; before its first checkpoint everything is still open.

    Raises:
        PositionError: what began there is another kind of run, or another version's.
    """
    place = join(config.run.directory, "config.yaml")
    if not checkpoints_of(config, store).begun() or not store.exists(place):
        return None
    try:
        begun = parse_config(yaml.safe_load(store.read(place)))
    except ConfigError as error:
        raise PositionError(
            f"{redact(place)} was written by another version ({error}): finish the run with that one, or "
            "choose another run.directory"
        ) from None
    if begun.run.task != config.run.task:
        where = redact(config.run.directory)
        raise PositionError(f"{where} holds a {KINDS[begun.run.task]} run: choose another run.directory")
    return begun


def checkpoints_of(
    config: Config,
    store: Store,
    warn: Callable[[str], None] = lambda _: None,
    *,
    lease: Lease | None = None,
) -> CheckpointFolder:
    """Return where the run keeps its checkpoints."""
    return CheckpointFolder(join(config.run.directory, "checkpoints"), store, lease=lease, warn=warn)


@contextmanager
def hold_lease(config: Config, ranks: Ranks, reporter: Reporter) -> Iterator[Lease]:
    """Be the only one that writes to the run's folder; rank 0 sees to it for all.

    Raises:
        LeaseError: another process writes there.
    """
    store = Store(config.storage)
    lease = Lease(
        config.run.directory,
        store,
        seconds=config.checkpoint.lease_seconds,
        tell=lambda text: reporter.event("lease", text),
    )
    with leaving_no_empty_folder(config.run.directory):
        ranks.lead(lambda: lease.acquire(above=checkpoints_of(config, store).last_writer()))
        try:
            yield lease
        finally:
            lease.release()


def mirror_of(run: Run) -> Mirror | None:
    """Return what copies the run to its second place, if it has one.

    Raises:
        ConfigError: it lies within the first.
    """
    target, metrics = run.config.checkpoint.copy_to, run.metrics
    if not target:
        return None

    def tell(error: StreamswavError | None) -> None:
        metrics.add("checkpoint_copies_total", 1, "failed" if error else "ok")
        if error:
            run.reporter.event("warning", f"the copy in {redact(target)} is behind: {error}")

    return Mirror(run.config.run.directory, target, run.store, tell=tell)


def refuse_other_grid(begun: Grid, config: Config) -> None:
    """Compare the grid that a run began with to what is configured; what is left open is no difference.

    Raises:
        PositionError: naming the first key that differs.
    """
    stream = config.stream
    now = {
        "training.batch": (begun.batch, config.training.batch),
        "stream.columns": (begun.columns, stream.columns),
        "stream.rows": (begun.rows, stream.rows),
        "stream.window": (begun.window, stream.window),
    }
    for key, (old, new) in now.items():
        if new is not None and new != old:
            raise PositionError(
                f"the run in {redact(config.run.directory)} began with {key} = {old}, now it is {new}: "
                "set it back, or choose another run.directory"
            )
