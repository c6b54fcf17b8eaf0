"""The folder of a run: what it began with, and what may not be another on the way."""

from __future__ import annotations

import json
from collections.abc import Callable

import yaml

from streamswav.config import Config, parse_config
from streamswav.errors import PositionError
from streamswav.stream.manifest import Manifest, Shard, list_manifest
from streamswav.stream.plan import Grid
from streamswav.stream.store import Store, join, redact
from streamswav.telemetry.progress import Reporter
from streamswav.training.checkpoint import CheckpointFolder


def freeze_manifest(config: Config, store: Store, reporter: Reporter, *, begun: bool) -> Manifest:
    """List the shards; a run that has begun keeps to the list it began with.

    Raises:
        PositionError: shards of the run's list are gone or were changed.
    """
    listed = list_manifest(config.stream.urls, store)
    place = join(config.run.directory, "manifest.json")
    if not begun or not store.exists(place):
        store.write(place, json.dumps(listed.to_json()).encode())
        return listed
    frozen = Manifest.from_json(json.loads(store.read(place)))
    there = {shard.key: shard for shard in listed.shards}
    for shard in frozen.shards:
        difference = _differs(shard, there.get(shard.key))
        if difference:
            raise PositionError(
                f"{redact(place)}: shard {shard.key} of this run {difference} below stream.urls; "
                "bring it back, or choose another run.directory for other data"
            )
    new = len(listed.shards) - len(frozen.shards)
    if new:
        reporter.event("new_shards", f"{new} shards came after the run began: they are left for another run")
    # Content may have moved as a whole, so today's URLs and versions hold for the shards of then.
    return Manifest(tuple(there[shard.key] for shard in frozen.shards), frozen.samples)


def _differs(frozen: Shard, found: Shard | None) -> str:
    """Say how a shard is no longer the run's; its version tells only where it has not moved."""
    if found is None:
        return "is gone"
    if found.size != frozen.size:
        return "has another size"
    return "was replaced" if redact(found.url) == frozen.url and found.version != frozen.version else ""


def read_begun(config: Config, store: Store) -> Config | None:
    """Read what was chosen when the run began; before its first checkpoint everything is still open."""
    place = join(config.run.directory, "config.yaml")
    if not checkpoints_of(config, store).begun() or not store.exists(place):
        return None
    return parse_config(yaml.safe_load(store.read(place)))


def checkpoints_of(
    config: Config, store: Store, warn: Callable[[str], None] = lambda _: None
) -> CheckpointFolder:
    """Return where the run keeps its checkpoints."""
    return CheckpointFolder(join(config.run.directory, "checkpoints"), store, warn=warn)


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
