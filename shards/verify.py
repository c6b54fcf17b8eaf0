"""Checking shards: is every byte accounted for, does every image decode, is anything missing?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from shards.build import STATS_FILE
from shards.scan import map_shards, read_shard
from streamswav.crops.decode import decode
from streamswav.errors import DataError, DecodeError, NotFoundError
from streamswav.stream.redaction import is_tombstone
from streamswav.stream.store import ObjectInfo, Store, join, redact
from streamswav.stream.tar import Damage, TarSample


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at an offset of a shard; `key` is empty where no sample could be told."""

    shard: str
    offset: int
    key: str
    reason: str


@dataclass(slots=True)
class ShardCheck:
    """The outcome for one shard."""

    shard: str
    samples: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify(
    shards: Sequence[ObjectInfo],
    store: Store,
    *,
    max_pixels: int,
    counted: Mapping[str, int] = MappingProxyType({}),
    workers: int = 1,
    on_shard: Callable[[], object] = lambda: None,
) -> list[ShardCheck]:
    """Parse and decode every sample of every shard.

    Args:
        shards: what to check.
        store: how to reach it.
        max_pixels: larger images are a problem, as they are for the trainer.
        counted: samples a shard by its producer's account, for all shards there should be.
        workers: processes.
        on_shard: called after each shard.

    Returns:
        One check a shard, in their order; a shard that is counted but not there has one too.
    """
    checks = []
    for check in map_shards(partial(verify_shard, max_pixels), shards, store, workers=workers):
        checks.append(check)
        on_shard()
    _compare_counts(checks, counted)
    return checks


def verify_shard(max_pixels: int, store: Store, info: ObjectInfo) -> ShardCheck:
    """Check one shard."""
    check = ShardCheck(redact(info.url))
    for item in read_shard(info, store):
        check.samples += isinstance(item, TarSample)
        reason = _reason(item, max_pixels)
        if reason:
            key = item.key if isinstance(item, TarSample) else ""
            check.problems.append(Problem(check.shard, item.start, key, reason))
    return check


def _reason(item: TarSample | Damage, max_pixels: int) -> str | None:
    if isinstance(item, Damage):
        return item.reason
    if is_tombstone(item.members):
        return None
    if item.image is None:
        return f"no_image: only {', '.join(sorted(item.members))}"
    try:
        decode(item.image, max_pixels=max_pixels)
    except DecodeError as error:
        return str(error)
    return None


def _compare_counts(checks: list[ShardCheck], counted: Mapping[str, int]) -> None:
    read = {check.shard: check for check in checks}
    for shard, promised in counted.items():
        if shard not in read:
            missing = Problem(shard, 0, "", f"missing, though {STATS_FILE} names it")
            checks.append(ShardCheck(shard, 0, [missing]))
        elif read[shard].samples != promised:
            reason = f"{read[shard].samples} samples, where {STATS_FILE} has {promised}"
            read[shard].problems.append(Problem(shard, 0, "", reason))


def read_counts(folder: str, store: Store) -> dict[str, int]:
    """Return the producer's count of samples for each shard below a folder, if it left any.

    Raises:
        DataError: there is a `_stats.json` that cannot be understood.
    """
    url = join(folder, STATS_FILE)
    try:
        shards = json.loads(store.read(url))["shards"]
        return {redact(join(folder, name)): int(shard["samples"]) for name, shard in shards.items()}
    except NotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{redact(url)}: cannot be understood ({error!r})") from None
