"""Reading back what `streamswav embed` wrote, and features that an evaluation kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamswav.config import StorageSection
from streamswav.errors import ConfigError, DataError
from streamswav.stream.labels import Label
from streamswav.stream.store import Store, join, redact
from streamswav.transfer.extraction.part_folder import INDEX_FILE, PartFolder, parse_name, read_index
from streamswav.transfer.extraction.part_formats import decode_part

_STORAGE = StorageSection()
_OPTION = "folder"


@dataclass(frozen=True)
class EmbeddedPart:
    """Consecutive images of a shard.

    Attributes:
        shard: its key.
        keys: N names.
        ordinals: N numbers of samples in the shard.
        labels: N class numbers, tuples of such, or None where an image has none.
        arrays: [N, ..] by output (`features`, `embeddings`, `scores`, `clusters`, `codes`, `code_clusters`).
    """

    shard: str
    keys: tuple[str, ...]
    ordinals: tuple[int, ...]
    labels: tuple[Label | None, ...]
    arrays: dict[str, NDArray[Any]]


def read_embeddings(
    folder: str, what: str = "", *, storage: StorageSection = _STORAGE
) -> tuple[NDArray[Any], list[str]]:
    """Read one output of all images into memory.

    Args:
        folder: that `streamswav embed --to` was given; local or s3://.
        what: which output; by default the first that was asked for.
        storage: how object storage is reached.

    Returns:
        The array [N, ..], in the order of the shards, and N keys. Keys may repeat between shards:
        `read_parts` tells the shard, too.

    Raises:
        ConfigError: there is no such output, or the folder is not finished.
        DataError: a file is damaged; `streamswav embed` writes it again.
        StorageError: the folder cannot be read.
    """
    arrays: list[NDArray[Any]] = []
    keys: list[str] = []
    for part in read_parts(folder, storage=storage):
        name = what or next(iter(part.arrays))
        if name not in part.arrays:
            reason = f"{redact(folder)} has {', '.join(part.arrays)}"
            raise ConfigError("what", reason, value=name)
        arrays.append(part.arrays[name])
        keys += part.keys
    return np.concatenate(arrays), keys


def read_parts(folder: str, *, storage: StorageSection = _STORAGE) -> Iterator[EmbeddedPart]:
    """Yield the parts of a finished folder one by one, in the order of the shards; for what exceeds memory.

    Raises:
        ConfigError, DataError, StorageError: as `read_embeddings`.
    """
    store = Store(storage)
    index = read_index(folder, store.read(join(folder, INDEX_FILE)), option=_OPTION)
    if "parts" not in index:
        reason = "is not finished: give streamswav embed the same command again"
        raise ConfigError(_OPTION, reason, value=redact(folder))
    names = index["about"]["what"]
    parts = PartFolder(folder, store, index["about"], option=_OPTION)
    for name, shard, images in index["parts"]:
        stretch = parse_name(name)
        loaded = parts.load(stretch) if stretch and images else None
        if loaded is None:
            if images:
                raise DataError(f"{redact(folder)}: {name} is damaged: streamswav embed writes it again")
            continue
        rows, arrays = decode_part(loaded[1])
        first = sorted(arrays, key=lambda each: names.index(each) if each in names else len(names))
        yield EmbeddedPart(
            shard, rows.keys, rows.ordinals, rows.labels, {each: arrays[each] for each in first}
        )
