"""Subsets of labelled shards, drawn once and written as small shards of their own.

Finetuning on 1% for twenty epochs then reads 1% twenty times. A subset is a list of keys, as SimCLR's
1percent.txt, or n images a class by a seed, as in the paper's low-shot protocol. It is the same whatever
ranks and workers draw it, and n = 13 is part of n = 128 of the same seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from streamswav.config import StorageSection
from streamswav.errors import ConfigError, DataError
from streamswav.stream.key_table import hash_key, normalise_key
from streamswav.stream.labels import Labels
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.reader import ShardReader
from streamswav.stream.select import Selection, read_lines
from streamswav.stream.store import Store, redact
from streamswav.training.distributed import Ranks, own_cores
from streamswav.transfer.subsets.folder import Subset, begin_subset, commit_subset, find_subset
from streamswav.transfer.subsets.scan import Choice, Picked, Record, scan
from streamswav.transfer.subsets.write import Entry, Writing, arrange

__all__ = ["Subset", "SubsetRequest", "draw_subset", "draw_subsets"]

_VERSION = 1
_SHOWN = 5
_WORTH_WORKERS = 1 << 30  # bytes of shards
_MOST_WORKERS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubsetRequest:
    """What is to be drawn; with both a list and a number, n a class of what is listed.

    Attributes:
        keys: file of keys or file names, one a line (`n01440764_10043.JPEG`), plain or gzipped, local or
            s3://. One without folders stands for the sample whose key ends in it.
        per_class: n, images of each class.
        seed: of the draw.
        option: name of the option that is to blame for a request that cannot be met.
    """

    keys: str = ""
    per_class: int | None = None
    seed: int = 0
    option: str = "subset"

    def describe(self) -> str:
        """Return it in a few words."""
        listed = f"the keys of {redact(self.keys)}" if self.keys else "all samples"
        if self.per_class is None:
            return listed
        return f"{self.per_class} a class of {listed} by seed {self.seed}"


def draw_subset(
    urls: Sequence[str],
    request: SubsetRequest,
    target: str,
    *,
    storage: StorageSection,
    labels: Labels,
    select: Selection | None = None,
    ranks: Ranks | None = None,
    workers: int | None = None,
    on_shard: Callable[[], object] = lambda: None,
) -> Subset:
    """Draw one subset, as `draw_subsets` does."""
    options: dict[str, Any] = {"storage": storage, "labels": labels, "select": select, "ranks": ranks}
    return draw_subsets(urls, {target: request}, **options, workers=workers, on_shard=on_shard)[target]


def draw_subsets(
    urls: Sequence[str],
    requests: Mapping[str, SubsetRequest],
    *,
    storage: StorageSection,
    labels: Labels,
    select: Selection | None = None,
    ranks: Ranks | None = None,
    workers: int | None = None,
    on_shard: Callable[[], object] = lambda: None,
) -> dict[str, Subset]:
    """Draw subsets with one pass over the shards, and write each into a folder; one that is there is used.

    To be called by all ranks together: each reads and writes a share. After the pass only the samples that
    were drawn are fetched, by their bytes. A subset that was begun and not finished is drawn again.

    Args:
        urls: labelled shards, in any form that `stream.urls` may have.
        requests: what is to be drawn, by the folder that it goes to (local or s3://).
        storage: how both are reached.
        labels: of the samples; those without are left out.
        select: tells what is not trained, and so not drawn (`stream.exclude`, `stream.where`).
        ranks: this process among those that work; default: it is alone.
        workers: processes of each rank that read and write; 0: it does so by itself. Default: none for less
            than a gigabyte, else the cores of the machine by its ranks, at most 8.
        on_shard: called as this rank is done with a shard.

    Returns:
        The subsets by their folders.

    Raises:
        ConfigError: a request that cannot be met, or a folder that holds something else.
        DataError: nothing can be drawn.
        ManifestError, StorageError: the shards cannot be found or read, or a folder not written.
    """
    for request in requests.values():
        _check(request, labels)
    ranks, store, select = ranks or Ranks(), Store(storage), select or Selection.none()
    manifest, tasks = ranks.lead(lambda: _prepare(urls, requests, f"{labels.digest} {select.digest}", store))
    drawn = {task.target: task.finished for task in tasks if task.finished}
    workers = _pick_workers(manifest) if workers is None else workers
    drawing = _Drawing(manifest, labels, store, ranks, workers)
    open_tasks = [task for task in tasks if not task.finished]
    if open_tasks:
        share = range(ranks.rank, len(manifest.shards), ranks.world_size)
        reader = ShardReader(manifest, storage, read_ahead=2)
        choices = [task.choice for task in open_tasks]
        work = partial(scan, reader, share, choices, labels, select=select, workers=workers)
        parts = ranks.each(partial(work, on_shard=on_shard))
        for task, first, *others in zip(open_tasks, *parts, strict=True):
            for other in others:
                first.merge(other)
            drawn[task.target] = drawing.write(task, first)
    return {target: drawn[target] for target in requests}


@dataclass(frozen=True, eq=False)
class _Task:
    """A subset that is to lie in a folder.

    Attributes:
        texts: listed keys, in the order of the choice's hashes.
        finished: what lies there already.
    """

    target: str
    request: SubsetRequest
    choice: Choice
    texts: tuple[str, ...]
    digest: str
    finished: Subset | None


@dataclass(frozen=True, eq=False)
class _Drawing:
    """Writes what was picked, on all ranks together."""

    manifest: Manifest
    labels: Labels
    store: Store
    ranks: Ranks
    workers: int

    def write(self, task: _Task, picked: Picked) -> Subset:
        """Write the shards of a subset, and make it whole."""
        records = picked.close()
        missing = [text for place, text in enumerate(task.texts) if place not in picked.found]
        self._refuse(task, picked, records, len(missing))
        shards = arrange(records, self.manifest)
        mine = {
            number: shards[number] for number in range(self.ranks.rank, len(shards), self.ranks.world_size)
        }
        label_member = self.labels.says_more_than_cls
        writing = Writing(self.store, self.manifest, mine, task.target, label_member)
        parts = self.ranks.each(lambda: writing.run(workers=self.workers))
        written = {name: each for part in parts for name, each in part.items()}
        values = self._describe(task, picked, [entry for shard in shards for entry in shard])
        values |= {"missing": len(missing), "missing_keys": missing[:_SHOWN]}
        values |= {"shards": dict(sorted(written.items()))}
        subset = self.ranks.lead(lambda: commit_subset(task.target, self.store, values, self.labels.names))
        if self.ranks.leads:
            _warn(task, subset, missing)
        return subset

    def _refuse(self, task: _Task, picked: Picked, records: Sequence[Record], missing: int) -> None:
        option, listed = task.request.option, redact(task.request.keys)
        if picked.ambiguous:
            key = task.texts[min(picked.ambiguous)]
            reason = f"{len(picked.ambiguous)} keys of {listed} fit several samples each, as {key!r}"
            raise ConfigError(option, f"{reason}; list them with their folders")
        if task.texts and missing == len(task.texts):
            shards = f"{len(self.manifest.shards):,} shards"
            reason = f"none of the {missing:,} keys of {listed} is in the {shards}, as {task.texts[0]!r}"
            raise ConfigError(option, reason)
        if not records:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(picked.skipped.items()))
            reason = f"there is nothing to draw a subset from ({counts or 'no samples'})"
            raise DataError(f"{reason}; {self.labels.needed}")

    def _describe(self, task: _Task, picked: Picked, entries: Sequence[Entry]) -> dict[str, Any]:
        """Return what `subset.json` says, but for the shards and what is missing."""
        manifest, request = self.manifest, task.request
        labels = (entry.record.label for entry in entries)
        numbers = (number for each in labels for number in ((each,) if isinstance(each, int) else each))
        counts = Counter(number for number in numbers if number >= 0)
        classes = range(self.labels.classes) if self.labels.classes else sorted(counts)
        short = [number for number in classes if counts[number] < (request.per_class or 0)]
        return {
            "version": _VERSION,
            "digest": task.digest,
            "request": request.describe(),
            "asked": {"keys": redact(request.keys), "per_class": request.per_class, "seed": request.seed},
            "source": {"manifest": manifest.digest, "shards": len(manifest.shards), "bytes": manifest.size},
            "labels": self.labels.digest,
            "samples": len(entries),
            "counts": {str(number): counts[number] for number in sorted(counts)},
            "short": {str(number): counts[number] for number in short},
            "listed": len(task.texts),
            "skipped": dict(sorted(picked.skipped.items())),
            "renamed": sum(entry.key != entry.record.key for entry in entries),
            "keys": [entry.key for entry in entries],
        }


def _check(request: SubsetRequest, labels: Labels) -> None:
    if not request.keys and request.per_class is None:
        raise ConfigError(request.option, "name a file of keys, or a number of images a class")
    if request.per_class is not None and request.per_class < 1:
        raise ConfigError(request.option, "at least one image a class", value=request.per_class)
    if request.per_class is not None and labels.multi:
        reason = "images that may have several labels are of no one class; give a file of keys"
        raise ConfigError(request.option, reason, value=request.per_class)


def _prepare(
    urls: Sequence[str], requests: Mapping[str, SubsetRequest], judges: str, store: Store
) -> tuple[Manifest, list[_Task]]:
    """List the shards, read the lists, and look what lies in the folders; mark what is begun."""
    manifest = list_manifest(urls, store)
    tasks = [_make_task(manifest, target, request, judges, store) for target, request in requests.items()]
    for task in tasks:
        if task.finished is None:
            about = {"digest": task.digest, "request": task.request.describe()}
            begin_subset(task.target, store, about)
    return manifest, tasks


def _make_task(manifest: Manifest, target: str, request: SubsetRequest, judges: str, store: Store) -> _Task:
    listed = _read_list(request, store) if request.keys else {}
    hashes = np.array(sorted(listed), np.uint64) if request.keys else None
    choice = Choice(request.per_class, request.seed, hashes)
    digest = _digest(manifest, choice, judges)
    finished = find_subset(target, store, digest=digest, option=request.option)
    return _Task(target, request, choice, tuple(listed[each] for each in sorted(listed)), digest, finished)


def _read_list(request: SubsetRequest, store: Store) -> dict[int, str]:
    lines = read_lines(request.keys, store, option=request.option)
    keys = {hash_key(key): key for _, text in lines if (key := normalise_key(text))}
    if not keys:
        raise ConfigError(request.option, f"{redact(request.keys)} lists no keys; write one a line")
    return keys


def _digest(manifest: Manifest, choice: Choice, judges: str) -> str:
    """Hash what decides the subset; `judges` is of labels and selection.

    Shards count by their versions: one that was redacted is another.
    """
    whole = hashlib.blake2b(digest_size=16)
    whole.update(json.dumps([_VERSION, choice.per_class, choice.seed, judges]).encode())
    whole.update(b"" if choice.hashes is None else choice.hashes.tobytes())
    for shard in manifest.shards:
        whole.update(f"{shard.key}\0{shard.size}\0{shard.version}\n".encode())
    return whole.hexdigest()


def _pick_workers(manifest: Manifest) -> int:
    if manifest.size < _WORTH_WORKERS:
        return 0
    return min(_MOST_WORKERS, own_cores())


def _warn(task: _Task, subset: Subset, missing: Sequence[str]) -> None:
    if missing:
        listed, shown = (
            f"{len(task.texts):,} keys of {redact(task.request.keys)}",
            ", ".join(missing[:_SHOWN]),
        )
        logger.warning(f"{len(missing):,} of the {listed} are not in the shards: {shown}")
    if subset.short:
        shown = ", ".join(f"{number} ({count})" for number, count in list(subset.short.items())[:_SHOWN])
        wanted = f"fewer than {task.request.per_class} images"
        logger.warning(f"{len(subset.short):,} classes have {wanted}: {shown}")
