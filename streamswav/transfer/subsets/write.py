"""Writing a subset: the samples that were picked, fetched by their places, as small shards of their own."""

from __future__ import annotations

import itertools
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info

from streamswav.errors import ChangedError, StreamswavError
from streamswav.processes import Failed, open_loader
from streamswav.stream.manifest import Manifest
from streamswav.stream.store import Store, join, redact
from streamswav.stream.tar import TarSample, read_samples
from streamswav.transfer.subsets.folder import shard_name
from streamswav.transfer.subsets.scan import Record

SHARD_BYTES = 64 << 20
LEAST_SHARDS = 16
SAMPLES_A_SHARD = 8

_END = bytes(1024)
_AT_ONCE = 32


@dataclass(frozen=True)
class Entry:
    """A sample of a subset: where it comes from, and the key that it has there."""

    record: Record
    key: str


def arrange(records: Sequence[Record], manifest: Manifest) -> list[list[Entry]]:
    """Deal the samples, which come in a random order, into shards.

    No more than 64 MiB each (where samples are not larger), at least 16 of them where there are samples
    enough for that: a reader has lanes to fill. A key that several samples have gets the shard's name and
    the sample's number in front.
    """
    total = sum(record.stop - record.start for record in records)
    least = min(LEAST_SHARDS, -(-len(records) // SAMPLES_A_SHARD))
    count = max(least, -(-total // SHARD_BYTES))
    keys = Counter(record.key for record in records)
    entries = [Entry(record, _key(record, manifest, keys)) for record in records]
    cuts = [number * len(entries) // count for number in range(count + 1)]
    return [entries[start:stop] for start, stop in itertools.pairwise(cuts)]


@dataclass(frozen=True, eq=False)
class Writing(IterableDataset["tuple[str, dict[str, int]] | Failed"]):
    """Writes shards of a subset, every n-th one a worker, and gives name, samples and bytes of each.

    Attributes:
        store: how both ends are reached.
        manifest: where samples come from.
        shards: what is in each, by number.
        target: folder.
        label_member: whether a sample's `.cls` is written with its label; else members are as they were.
    """

    store: Store
    manifest: Manifest
    shards: Mapping[int, Sequence[Entry]]
    target: str
    label_member: bool

    def run(self, *, workers: int) -> dict[str, dict[str, int]]:
        """Write all shards, and return samples and bytes by name.

        Raises:
            ChangedError: a shard that is read was replaced meanwhile.
            StorageError: it cannot be read, or the target not written.
        """
        written = {}
        with open_loader(self, workers=min(workers, len(self.shards))) as parts:
            for part in parts:
                if isinstance(part, Failed):
                    raise part.error
                if part is not None:
                    written[part[0]] = part[1]
        return written

    def __iter__(self) -> Iterator[tuple[str, dict[str, int]] | Failed]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="subset") as pool:
            try:
                for number in list(self.shards)[first::step]:
                    size = self._write(number, pool)
                    yield shard_name(number), {"samples": len(self.shards[number]), "bytes": size}
            except StreamswavError as error:
                yield Failed(error)

    def _write(self, number: int, pool: ThreadPoolExecutor) -> int:
        size = 0
        with self.store.writing(join(self.target, shard_name(number))) as file:
            for entry, sample in _fetch(self.store, self.manifest, self.shards[number], pool):
                members = dict(sample.members)
                if self.label_member:
                    members["cls"] = str(entry.record.label).encode()
                for extension, data in members.items():
                    size += file.write(_member(f"{entry.key}.{extension}", data))
            size += file.write(_END)
        return size


def _fetch(
    store: Store, manifest: Manifest, entries: Sequence[Entry], pool: ThreadPoolExecutor
) -> Iterator[tuple[Entry, TarSample]]:
    """Yield the samples in order, a few of which are on their way."""
    waiting: deque[tuple[Entry, Future[TarSample]]] = deque()
    for entry in entries:
        waiting.append((entry, pool.submit(_read, store, manifest, entry.record)))
        if len(waiting) > 2 * _AT_ONCE:
            done, future = waiting.popleft()
            yield done, future.result()
    while waiting:
        done, future = waiting.popleft()
        yield done, future.result()


def _read(store: Store, manifest: Manifest, record: Record) -> TarSample:
    shard = manifest.shards[record.shard]
    data = store.read_range(shard.url, record.start, record.stop, version=shard.version)
    item = next(read_samples([data], start=record.start, ordinal=record.ordinal), None)
    if isinstance(item, TarSample) and item.key == record.key:
        return item
    raise ChangedError(redact(shard.url), "holds other samples than a moment ago; draw the subset again")


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def _key(record: Record, manifest: Manifest, keys: Mapping[str, int]) -> str:
    if keys[record.key] == 1:
        return record.key
    shard = manifest.shards[record.shard].key.removesuffix(".tar")
    return f"{shard}/{record.ordinal:08d}/{record.key}"
