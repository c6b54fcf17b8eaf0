"""Writing shards: WebDataset tars by webdataset's own writer, the same bytes from the same source."""

from __future__ import annotations

import itertools
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import webdataset

from shards.images import extension_of
from shards.sources import Item, Source
from streamswav.errors import ConfigError, DecodeError, ManifestError, NotFoundError
from streamswav.stream.store import Store, join

STATS_FILE = "_stats.json"
CLASSES_FILE = "classes.json"
OWNER = "streamswav"

Sample = dict[str, str | bytes]

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a source is cut into shards.

    Attributes:
        samples_per_shard, bytes_per_shard: a shard ends at whichever comes first.
        prefix: shards are called PREFIX-000000.tar.
        shuffle: seed of the order; None keeps the source's, in which the images of a class are neighbours.
        limit: take that many images.
        strict: an unreadable image is an error.
        overwrite: replace what is at the destination.
    """

    samples_per_shard: int = 1000
    bytes_per_shard: int = 300_000_000
    prefix: str = "train"
    shuffle: int | None = 0
    limit: int | None = None
    strict: bool = False
    overwrite: bool = False


@dataclass(slots=True)
class Built:
    """What was written: samples and bytes by shard, and what was left out."""

    classes: list[str]
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard["samples"] for shard in self.shards.values())

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard["bytes"] for shard in self.shards.values())

    def to_json(self) -> str:
        """The content of `_stats.json`."""
        values = {
            "samples": self.samples,
            "bytes": self.bytes,
            "skipped": len(self.skipped),
            "classes": self.classes,
            "shards": self.shards,
        }
        return json.dumps(values, indent=1) + "\n"


def build(
    source: Source,
    destination: str,
    store: Store,
    options: BuildOptions,
    *,
    on_image: Callable[[], object] = lambda: None,
) -> Built:
    """Write all images of a source as shards, then `classes.json` and, last of all, `_stats.json`.

    Args:
        source: what to read.
        destination: a folder or an s3:// prefix. A shard appears there whole or not at all.
        store: how to reach it.
        options: how to cut.
        on_image: called after each image, a skipped one too.

    Raises:
        ConfigError: the destination is not empty, and `overwrite` was not asked for.
        DecodeError: an image cannot be read, and `strict` was asked for.
        ManifestError: not a single image can be read.
        StorageError: the destination cannot be written.
    """
    stale = _prepare(destination, store, options)
    built = Built(list(source.classes))
    samples = _read(source, options, built, on_image)
    with tempfile.TemporaryDirectory(prefix="streamswav-shards-") as folder:
        aside = Path(folder, "shard.tar")
        for number, dealt in itertools.groupby(_deal(samples, options), key=itemgetter(0)):
            name = f"{options.prefix}-{number:06d}.tar"
            count = _write_shard(aside, (sample for _, sample in dealt))
            store.upload(aside, join(destination, name))
            built.shards[name] = {"samples": count, "bytes": aside.stat().st_size}
    if not built.shards:
        raise ManifestError("; ".join(["not a single image of the source can be read", *built.skipped[:1]]))
    for name in stale - built.shards.keys():
        store.delete(join(destination, name))
    if built.classes:
        store.write(join(destination, CLASSES_FILE), (json.dumps(built.classes, indent=1) + "\n").encode())
    store.write(join(destination, STATS_FILE), built.to_json().encode())
    return built


def _prepare(destination: str, store: Store, options: BuildOptions) -> set[str]:
    """Refuse a destination that holds anything; or unmark it, and name the shards to be replaced."""
    try:
        found = [info.url[len(join(destination, "")) :] for info in store.list(destination)]
    except NotFoundError:
        found = []
    if found and not options.overwrite:
        reason = f"holds {len(found)} objects already; give another place, or --overwrite"
        raise ConfigError("DEST", reason, value=destination)
    if STATS_FILE in found:
        store.delete(join(destination, STATS_FILE))
    return {name for name in found if re.fullmatch(rf"{re.escape(options.prefix)}-\d{{6}}\.tar", name)}


def _read(
    source: Source, options: BuildOptions, built: Built, on_image: Callable[[], object]
) -> Iterator[Sample]:
    order = list(range(len(source)))
    if options.shuffle is not None:
        random.Random(options.shuffle).shuffle(order)  # noqa: S311 - an order, not a secret
    for index in order[: options.limit]:
        try:
            sample = _sample(source.read(index))
        except DecodeError as error:
            if options.strict:
                raise
            built.skipped.append(str(error))
        else:
            yield sample
        on_image()


def _sample(item: Item) -> Sample:
    try:
        extension = extension_of(item.data)
    except DecodeError as error:
        raise DecodeError(error.reason, f"{item.key}: {error.detail}") from None
    sample: Sample = {"__key__": item.key, extension: item.data}
    if item.label is not None:
        sample["cls"] = str(item.label).encode()
    return sample


def _deal(samples: Iterable[Sample], options: BuildOptions) -> Iterator[tuple[int, Sample]]:
    """Give each sample the number of its shard."""
    number = count = size = 0
    for sample in samples:
        members = [data for data in sample.values() if isinstance(data, bytes)]
        length = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in members)
        if count and (count >= options.samples_per_shard or size + length > options.bytes_per_shard):
            number, count, size = number + 1, 0, 0
        yield number, sample
        count, size = count + 1, size + length


def _write_shard(path: Path, samples: Iterable[Sample]) -> int:
    count = 0
    with path.open("wb") as file, _tar_writer(file) as writer:
        for sample in samples:
            writer.write(sample)
            count += 1
    return count


def _tar_writer(file: BinaryIO) -> Any:
    """Everything that could vary is fixed, so that the same samples make the same bytes."""
    return webdataset.TarWriter(
        file, user=OWNER, group=OWNER, mode=0o444, mtime=0, compress=False, encoder=False
    )
