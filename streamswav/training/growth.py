"""Shards that come while a run goes on: one rank looks for them, and the manifest grows by a part."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from streamswav.errors import ManifestError
from streamswav.stream.manifest import Manifest, Shard, count_samples, list_manifest
from streamswav.stream.store import Store

Grown = tuple[Sequence[Shard], Sequence[int | None]]


class Growth:
    """Lists the URLs again, at intervals, on rank 0.

    Args:
        urls: as the manifest was listed.
        store: where to look.
        manifest: what is known.
        place: URL of the run's manifest, which is written before anything new is trained.
        seconds: between two listings.
        idle_seconds: how long to wait for something new; None: for ever.
        on_found: told how many shards a listing found that are new.
    """

    def __init__(
        self,
        urls: Sequence[str],
        store: Store,
        manifest: Manifest,
        place: str,
        *,
        seconds: float,
        idle_seconds: float | None,
        on_found: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._urls, self._store, self._manifest, self._place = urls, store, manifest, place
        self._seconds, self._idle_seconds = seconds, idle_seconds
        self._on_found, self._clock = on_found, clock
        self._listed_at = -seconds
        self._begun: dict[str, str] = {}

    def take(self) -> Grown | None:
        """Return new shards with the counts of all sources, once they lie in the run's manifest.

        Nothing is listed more often than once in the interval. A local file joins when two listings agree
        on it, since it may still be written; objects elsewhere appear whole.

        Raises:
            StorageError: a location that cannot be listed.
        """
        if self._clock() - self._listed_at < self._seconds:
            return None
        listed = self._list()
        self._listed_at = self._clock()
        known = {shard.key for shard in self._manifest.shards}
        found = [shard for shard in listed if shard.key not in known]
        whole = [each for each in found if _appears_whole(each) or self._begun.get(each.key) == each.version]
        self._begun = {shard.key: shard.version for shard in found}
        if not whole:
            return None
        counts = self._counts_with(whole)
        self._manifest = self._manifest.grown(whole, counts)
        self._store.write(self._place, json.dumps(self._manifest.to_json()).encode())
        self._on_found(len(whole))
        return whole, counts

    def _list(self) -> Sequence[Shard]:
        try:
            return list_manifest(self._urls, self._store).shards
        except ManifestError:  # a bucket whose old shards expire may be empty for a while
            return ()

    def _counts_with(self, new: Sequence[Shard]) -> list[int | None]:
        before = self._manifest.counts
        joined = count_samples(new, len(before), self._store)
        pairs = zip(before, joined, strict=True)
        return [None if old is None or more is None else old + more for old, more in pairs]

    def given_up(self, waited: float) -> bool:
        """Tell whether so many seconds without anything new are too many."""
        return self._idle_seconds is not None and waited >= self._idle_seconds


def _appears_whole(shard: Shard) -> bool:
    """Tell whether the shard lies where nobody sees an object that is still being written."""
    return "://" in shard.url and not shard.url.startswith("file://")
