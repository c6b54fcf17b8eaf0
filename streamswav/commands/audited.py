"""A run as `streamswav audit` finds it: a checkpoint, the manifest and the side lists."""

from __future__ import annotations

import json
import posixpath
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import yaml

from streamswav.commands.run_folder import MANIFEST_FILE
from streamswav.config import Config, parse_config
from streamswav.errors import CheckpointError, NotFoundError
from streamswav.stream.account import Claims, begun_parts
from streamswav.stream.listed import SideLists, find_lists
from streamswav.stream.manifest import Manifest, Shard, list_manifest
from streamswav.stream.outcomes import PassedOver
from streamswav.stream.pieces import Part, Piece, by_part, holds
from streamswav.stream.position import Position
from streamswav.stream.store import Store, join, redact
from streamswav.training.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint

_FILES = ("position.json", "config.yaml")


@dataclass(frozen=True)
class AuditedRun:
    """What is held against what.

    Attributes:
        url: the run's folder.
        store: how it is reached.
        shard_store: how the shards are reached.
        manifest: the run's shards, with the URLs they have now.
        checkpoint: the one that is audited.
        newest: whether it is the run's newest.
        position: its position.
        sources: the URLs of the shards, without credentials.
        lists: what was passed over until then.
    """

    url: str
    store: Store
    shard_store: Store
    manifest: Manifest
    checkpoint: Checkpoint
    newest: bool
    position: Position
    sources: tuple[str, ...]
    lists: SideLists

    @property
    def name(self) -> str:
        """The checkpoint's name in its folder."""
        return posixpath.basename(self.checkpoint.url)

    @cached_property
    def left(self) -> dict[Part, list[Piece]]:
        """What the position has not consumed of what it has begun."""
        return by_part(self.position.left(self.manifest))

    @cached_property
    def begun(self) -> dict[Part, None]:
        """Shards in passes that the position has begun."""
        return dict.fromkeys(begun_parts(self.position, self.manifest))

    @cached_property
    def damages(self) -> dict[Part, list[PassedOver]]:
        """The position's damages."""
        found: dict[Part, list[PassedOver]] = {}
        for each in self.position.damages:
            found.setdefault((each.shard, each.turn), []).append(each)
        return found

    def is_left(self, part: Part, ordinal: int) -> bool:
        """Tell whether the position has yet to come to a sample."""
        return part not in self.begun or holds(self.left.get(part, ()), ordinal)

    def claims(self, part: Part) -> Claims:
        """Return what is said of a shard in a pass that has begun."""
        pieces = self.left.get(part, ())
        passed = (each for each in self.lists.of(part) if not holds(pieces, each.ordinal or 0))
        return Claims(part[1], tuple(pieces), tuple(passed), tuple(self.damages.get(part, ())))


def open_run(url: str, given: Config, *, checkpoint: str | None = None) -> AuditedRun:
    """Read a run at its newest whole checkpoint, or at another one.

    Args:
        url: the run's folder.
        given: how storage is reached, and where the shards lie if no longer where they did.
        checkpoint: name or URL of another checkpoint.

    Raises:
        CheckpointError: there is no run, or no whole checkpoint.
        StreamswavError: as the store deserves.
    """
    store = Store(given.storage)
    found, files = _find(url, store, checkpoint)
    saved = parse_config(yaml.safe_load(files["config.yaml"]))
    storage = saved.storage.model_copy(update=given.storage.model_dump(exclude_unset=True))
    shard_store = Store(storage)
    manifest = _read_manifest(url, store)
    if given.stream.urls:
        manifest = _relocate(manifest, given.stream.urls, shard_store)
    return AuditedRun(
        url,
        store,
        shard_store,
        manifest,
        found,
        newest=checkpoint is None,
        position=Position.from_json(json.loads(files["position.json"])),
        sources=tuple(map(redact, saved.stream.urls)),
        lists=_read_lists(url, store, manifest, until=found.step),
    )


def open_kept(newest: AuditedRun) -> list[AuditedRun]:
    """Return the run at every checkpoint that was kept and is whole, oldest first."""
    folder = CheckpointFolder(join(newest.url, "checkpoints"), newest.store)
    kept = []
    for name in folder.names():
        try:
            found, files = read_checkpoint(join(folder.url, name), newest.store, only=_FILES)
        except CheckpointError as error:
            _warn(str(error))
            continue
        position = Position.from_json(json.loads(files["position.json"]))
        kept.append(replace(newest, checkpoint=found, position=position))
    return kept


def _find(url: str, store: Store, checkpoint: str | None) -> tuple[Checkpoint, dict[str, bytes]]:
    folder = join(url, "checkpoints")
    if checkpoint is not None:
        place = checkpoint if "/" in checkpoint else join(folder, checkpoint)
        return read_checkpoint(place.rstrip("/"), store, only=_FILES)
    found = CheckpointFolder(folder, store, warn=_warn).newest(only=_FILES)
    if found is None and store.exists(join(url, MANIFEST_FILE)):
        raise CheckpointError(
            f"{redact(url)}: the run has saved no checkpoint yet, there is nothing to audit"
        )
    if found is None:
        raise CheckpointError(
            f"{redact(url)}: there is no checkpoint; give the folder of a run (pretrain's run.directory)"
        )
    return found


def _read_manifest(url: str, store: Store) -> Manifest:
    try:
        return Manifest.from_json(json.loads(store.read(join(url, MANIFEST_FILE))))
    except NotFoundError:
        raise CheckpointError(f"{redact(url)}: no {MANIFEST_FILE}; this is no run's folder") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{join(redact(url), MANIFEST_FILE)}: cannot be understood") from None


def _relocate(manifest: Manifest, urls: Sequence[str], store: Store) -> Manifest:
    """Give the shards the URLs they have now; a shard that stayed keeps the version it was read with."""
    there = {shard.key: shard for shard in list_manifest(urls, store).shards}

    def now(shard: Shard) -> Shard:
        found = there.get(shard.key)
        if found is None or found.size != shard.size:
            return shard
        stayed = redact(found.url) == shard.url
        return replace(shard, url=found.url, version=shard.version if stayed else found.version)

    return replace(manifest, shards=tuple(map(now, manifest.shards)))


def _read_lists(url: str, store: Store, manifest: Manifest, *, until: int) -> SideLists:
    """Read what was listed up to a step; later lists belong to later checkpoints."""
    lists = SideLists(manifest)
    for outcome, step, place in find_lists(store, url):
        if step <= until:
            lists.read(f"{outcome}/{posixpath.basename(place)}", outcome, store.read(place))
    return lists


def _warn(text: str) -> None:
    sys.stderr.write(f"streamswav: passed over: {text}\n")
