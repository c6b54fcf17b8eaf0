"""The stream on its own: raw samples, in one process, for any consumer."""

from __future__ import annotations

import io
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from streamswav.config import StorageSection, StreamSection
from streamswav.errors import ConfigError, DecodeError, PositionError
from streamswav.stream.grid import Grid
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.outcomes import PassedOver, Tally, sample_digest
from streamswav.stream.position import Position
from streamswav.stream.reader import ShardReader
from streamswav.stream.samples import LaneReader, Sample, pass_over
from streamswav.stream.select import Selection, load_selection
from streamswav.stream.store import Store

_DEFAULT_STREAM = StreamSection()
_DEFAULT_STORAGE = StorageSection()
_SETTLE_AFTER = 1000

Urls = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Step:
    """What a stream met next.

    Attributes:
        sample: that it gives; None at the end of a pass.
        passed: what was passed over before it: damages, and samples that are not given.
    """

    sample: Sample | None
    passed: Sequence[PassedOver]


class Ledger:
    """Keeps a position up to date step by step; the position itself is made when it is asked for."""

    def __init__(self, position: Position, manifest: Manifest) -> None:
        self._position, self._manifest = position, manifest
        self._digests: dict[int, int] = {}
        self._begin()

    @property
    def position(self) -> Position:
        """The position after all steps taken."""
        position = self._position
        if self._last is not None:
            position = position.advance({0: self._last.cursor}, batches=self._given)
            tallies = ((source, Tally(*numbers)) for source, numbers in self._tallies.items())
            position = position.count("trained", tallies)
        self._position = position.record(position.unknown(self._passed), self._manifest)
        self._begin()
        return self._position

    def take(self, step: Step) -> None:
        """Count what was passed over, and the sample as given."""
        self._passed += step.passed
        if step.sample is None:
            self._position = self.position.next_turn(())
        else:
            self._count(step.sample)
        if len(self._passed) > _SETTLE_AFTER:
            self._position = self.position

    def _begin(self) -> None:
        self._last: Sample | None = None
        self._given = 0
        self._tallies: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._passed: list[PassedOver] = []

    def _count(self, sample: Sample) -> None:
        identity, start, stop = sample.id, sample.start, sample.stop
        shard = self._manifest.shards[identity.shard]
        digest = self._digests.get(identity.shard)
        if digest is None:
            digest = self._digests[identity.shard] = shard.digest
        numbers = self._tallies[shard.source]
        numbers[0] += 1
        numbers[1] += stop - start
        # The tally's constructor does not reduce; its modulus is 2^64.
        added = numbers[2] + sample_digest(digest, identity.turn, identity.ordinal, start, stop)
        numbers[2] = added & 0xFFFF_FFFF_FFFF_FFFF
        self._given += 1
        self._last = sample


class Stream:
    """Gives the samples of all passes, each once, from a position on. It is its own iterator, as a file is.

    Made by `open_stream`.

    Attributes:
        manifest: the shards.
    """

    def __init__(
        self, manifest: Manifest, position: Position, reader: ShardReader, select: Selection | None = None
    ) -> None:
        self.manifest, self._reader, self._select = manifest, reader, select or Selection.none()
        self._go_to(position)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        while True:
            step = next(self._steps)
            self._ledger.take(step)
            if step.sample is not None:
                return step.sample

    @property
    def position(self) -> Position:
        """Where the stream is after the samples given so far, with what became of all samples."""
        return self._ledger.position

    @property
    def damages(self) -> tuple[PassedOver, ...]:
        """Stretches of shards that could not be parsed, so far."""
        return self.position.damages

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the samples given so far: plain data, fit for JSON."""
        return self.position.to_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a position over the same shards: of a stream, a loader, or a run's `position.json`.

        Raises:
            PositionError: it belongs to other shards, or is no position.
        """
        self._go_to(read_position(state))

    def steps(self) -> Iterator[Step]:
        """Return the steps from the position on, for those who keep account of them themselves."""
        position = self.position
        self._reader.share_among(1, position.grid.window)
        return self._walk(position)

    def _go_to(self, position: Position) -> None:
        position.covered(self.manifest)
        # What ranks and workers left is dealt again, to this process alone.
        begun = position.on_grid(self.manifest, Grid(1, 1, 1, position.grid.window))
        self._ledger = Ledger(begun, self.manifest)
        self._steps = self.steps()

    def _walk(self, position: Position) -> Iterator[Step]:
        shards = self.manifest.shards
        while not position.finished:
            plan, cursor = position.plan(self.manifest), position.cursors.get(0)
            lane = LaneReader(plan, 0, self._reader.open, cursor, shelf=self._reader.shelf)
            passed: list[PassedOver] = []
            while (sample := next(lane, None)) is not None:
                verdict = self._select.judge(sample, shards[sample.id.shard].key)
                passed += lane.take_damages()
                if verdict is not None:
                    passed.append(pass_over(sample.id, sample, *verdict))
                    continue
                yield Step(sample, passed)
                passed = []
            yield Step(None, [*passed, *lane.take_damages()])
            position = position.next_turn(())


def open_stream(
    urls: Urls,
    *,
    seed: int = _DEFAULT_STREAM.seed,
    passes: int | Sequence[int] = 1,
    window: int = _DEFAULT_STREAM.window,
    exclude: Sequence[str] = (),
    where: Sequence[str] = (),
    storage: StorageSection = _DEFAULT_STORAGE,
    memory: int = _DEFAULT_STREAM.memory,
    position: Position | None = None,
    part: tuple[int, int] = (0, 1),
) -> Stream:
    """Open the samples of tar shards, each exactly once a pass, in a shuffled order.

    Args:
        urls: one or several prefixes, globs, brace patterns, single tars or `@FILE` lists; local, s3:// or http(s)://.
        seed: of the order; every pass has another one.
        passes: over all shards, or one number for each of `urls`.
        window: samples of a shard that are permuted together.
        exclude: files of keys that are not given, one a line.
        where: conditions that a sample must meet, as "json.width >= 256", or "module:function".
        storage: endpoint, region, block size, deadline.
        memory: bytes of blocks and windows; order does not depend on it, but a sample that is too large for
            it is quarantined.
        position: continue after it (`Stream.position` of an earlier stream over the same shards), in its
            order; as `load_state_dict`.
        part: (i, n): every n-th shard only, from the i-th on; for n processes.

    Raises:
        ConfigError: arguments that cannot work, or conditions that cannot be understood.
        ManifestError: there are no shards.
        PositionError: the position belongs to other shards.
        StorageError: a location that cannot be read.
    """
    given = url_list(urls)
    section = StreamSection(urls=given, exclude=list(exclude), where=list(where))
    store = Store(storage)
    select = load_selection(section, store, size_of=_image_size)
    manifest = _take_part(list_manifest(given, store), part)
    reader = ShardReader(manifest, storage, read_ahead=2, memory=memory)
    begun = Position(manifest.digest, Grid(1, 1, 1, window), seed, passes_of(passes, given))
    return Stream(manifest, position or begun, reader, select)


def url_list(urls: Urls) -> list[str]:
    """Return one or several URLs or paths as a list of texts.

    Raises:
        ConfigError: there are none.
    """
    given = [urls] if isinstance(urls, str | os.PathLike) else urls
    if not given:
        raise ConfigError("urls", "say where the shards are: a folder, s3://bucket/shards/, a pattern")
    return [os.fspath(url) for url in given]


def passes_of(passes: int | Sequence[int], urls: Sequence[str]) -> tuple[int, ...]:
    """Return the passes over each URL.

    Raises:
        ConfigError: that is not one positive number, or one for each URL.
    """
    each = (passes,) * len(urls) if isinstance(passes, int) else tuple(passes)
    if len(each) != len(urls) or min(each) < 1:
        reason = f"must be a positive number, or one for each of the {len(urls)} urls"
        raise ConfigError("passes", reason, value=passes)
    return each


def read_position(state: Mapping[str, Any]) -> Position:
    """Read what a `state_dict` gave.

    Raises:
        PositionError: it is something else, or was written with another order of samples.
    """
    try:
        return Position.from_json(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PositionError(
            f"this is not the state of a stream ({error!r}); give what state_dict returned"
        ) from None


def _take_part(whole: Manifest, part: tuple[int, int]) -> Manifest:
    index, parts = part
    if not 0 <= index < parts:
        raise ConfigError("part", "must be (i, n) with i from 0 to n - 1", value=part)
    if parts == 1:
        return whole
    return replace(whole, shards=whole.shards[index::parts], counts=(None,) * len(whole.counts))


def _image_size(data: bytes) -> tuple[int, int]:
    """Read (height, width) from an image's header; for conditions, since nothing here decodes.

    Raises:
        DecodeError: it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise DecodeError("not_an_image", str(error)) from None
