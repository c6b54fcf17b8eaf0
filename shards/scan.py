"""Reading shards back: finding them, parsing them strictly, several at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

from streamswav.errors import ManifestError
from streamswav.stream.store import ObjectInfo, Store, is_pattern, redact
from streamswav.stream.tar import Damage, TarSample, read_samples

Result = TypeVar("Result")


def find_shards(url: str, store: Store) -> list[ObjectInfo]:
    """Return the shards behind a URL: one tar, a pattern, or all `.tar` objects below a prefix.

    Raises:
        ManifestError: there are none.
        StorageError: the place cannot be listed.
    """
    if is_folder(url):
        found = store.list(url)
    elif is_pattern(url):
        found = store.glob(url)
    else:
        found = [store.info(url)]
    shards = [info for info in found if redact(info.url).endswith(".tar")]
    if not shards:
        raise ManifestError(f"{redact(url)}: no .tar objects there; check the prefix and its spelling")
    return shards


def is_folder(url: str) -> bool:
    """Tell whether the URL stands for everything below it: it is neither a pattern nor a tar."""
    return not is_pattern(url) and not redact(url).endswith(".tar")


def read_shard(info: ObjectInfo, store: Store) -> Iterator[TarSample | Damage]:
    """Parse one shard, block by block."""
    length = store.section.block_bytes
    spans = ((start, min(start + length, info.size)) for start in range(0, info.size, length))
    blocks = (store.read_range(info.url, *span, version=info.version) for span in spans)
    return read_samples(blocks, size=info.size)


def map_shards(
    function: Callable[[Store, ObjectInfo], Result],
    shards: Sequence[ObjectInfo],
    store: Store,
    *,
    workers: int,
) -> Iterator[Result]:
    """Yield `function(store, shard)` in the order of the shards; with one worker here, else in processes."""
    call = partial(function, store)
    if workers <= 1 or len(shards) == 1:
        yield from map(call, shards)
        return
    # A server that has imported everything once is forked: threads and clients only start in the forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.verify", "shards.describe"])
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=context) as pool:
        yield from pool.map(call, shards)
