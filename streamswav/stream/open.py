"""The stream on its own: samples with cursors, in one process, for any consumer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from streamswav.config import StorageSection, StreamSection
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.outcomes import PassedOver, Tally, tally_one
from streamswav.stream.plan import Grid
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader, Sample
from streamswav.stream.store import Store

_DEFAULT_STREAM = StreamSection()
_DEFAULT_STORAGE = StorageSection()


class Stream:
    """Iterates once over the samples of all passes, from `position` on.

    Attributes:
        manifest: the shards.
        position: where the stream is after the samples given so far; plain data by `to_json`.
        damages: stretches of shards that could not be parsed.
    """

    def __init__(self, manifest: Manifest, position: Position, reader: ShardReader) -> None:
        self.manifest, self.position, self._reader = manifest, position, reader
        self.damages: list[PassedOver] = []

    def __iter__(self) -> Iterator[Sample]:
        while not self.position.finished:
            plan, cursor = self.position.plan(self.manifest), self.position.cursors.get(0)
            lane = LaneReader(plan, 0, self._reader.open, cursor, shelf=self._reader.shelf)
            for sample in lane:
                position = self.position.advance({0: sample.cursor}, batches=1)
                self.position = position.count("trained", [self._tally(sample)])
                self.damages += lane.take_damages()
                yield sample
            self.damages += lane.take_damages()
            self.position = self.position.next_turn(())

    def _tally(self, sample: Sample) -> tuple[int, Tally]:
        shard, identity = self.manifest.shards[sample.id.shard], sample.id
        tally = tally_one(shard.digest, identity.turn, identity.ordinal, sample.start, sample.stop)
        return shard.source, tally


def open_stream(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    seed: int = _DEFAULT_STREAM.seed,
    passes: int = 1,
    window: int = _DEFAULT_STREAM.window,
    storage: StorageSection = _DEFAULT_STORAGE,
    position: Position | None = None,
    part: tuple[int, int] = (0, 1),
) -> Stream:
    """Open the samples of tar shards, each exactly once a pass, in a shuffled order.

    Args:
        urls: one or several prefixes, globs, brace patterns, single tars or `@FILE` lists; local, s3:// or http(s)://.
        seed: of the order; every pass has another one.
        passes: over all shards.
        window: samples of a shard that are permuted together.
        storage: endpoint, region, block size, deadline.
        position: continue after it (`Stream.position` of an earlier stream over the same shards).
        part: (i, n): every n-th shard only, from the i-th on; for n processes.

    Raises:
        ManifestError: there are no shards.
        PositionError: the position belongs to other shards.
        StorageError: a location that cannot be read.
    """
    given = [urls] if isinstance(urls, str | os.PathLike) else urls
    whole = list_manifest([os.fspath(url) for url in given], Store(storage))
    index, parts = part
    counts = (None,) * len(given)
    manifest = whole if parts == 1 else Manifest(whole.shards[index::parts], counts)
    reader = ShardReader(manifest, storage, read_ahead=2)
    begun = position or Position(manifest.digest, Grid(1, 1, 1, window), seed, (passes,) * len(given))
    begun.plan(manifest)
    return Stream(manifest, begun, reader)
