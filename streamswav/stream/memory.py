"""One budget of memory a worker: what of it is for blocks, for windows, for samples that are read again.

Order never follows from it. A sample that finds no room in its window is kept by its place alone, and its
bytes are read again when it is given. One that alone is larger than what is set aside for it (dozens of
megabytes, fewer with more lanes a worker) is quarantined as too_large; where such samples are to be trained,
give more memory, or tell them off with `stream.where` lest it depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from streamswav.errors import ConfigError
from streamswav.stream.sharing import SharedShards
from streamswav.stream.tar import Damage, TarSample

SMALLEST_BLOCK = 64 << 10

_GOOD_BLOCK = 256 << 10
_PLACE_BYTES = 512  # a sample kept by its place: numbers, key, and what holds them

Answer = Callable[[], TarSample | Damage]
Fetch = Callable[[int, TarSample], Answer]


@dataclass(frozen=True, slots=True)
class Shares:
    """What follows from a budget, all in bytes but for `read_ahead`.

    Attributes:
        block: of one ranged read.
        read_ahead: blocks on their way for each shard, beyond the one that is parsed.
        held: samples that wait in windows.
        ahead: samples that are read again before they are given.
        largest: most bytes of one sample.
    """

    block: int
    read_ahead: int
    held: int
    ahead: int
    largest: int


def share_memory(
    memory: int, *, lanes: int, window: int, block: int, read_ahead: int, requests: int
) -> Shares:
    """Share a budget among so many lanes that stay open.

    An eighth is left to the allocator, and the places of all windows come first. Of the rest blocks get up
    to a third: a lane holds the block it parses and those ahead, a request in flight holds its own twice.
    Windows get three quarters of what blocks leave. The last quarter is for samples that are read again: a
    sixteenth for those ahead, three for the largest one, which is there three times on its way.

    Args:
        memory: the budget in bytes.
        lanes: lanes that stay open.
        window: samples of a window.
        block: bytes of the largest ranged read.
        read_ahead: most blocks ahead of a shard's parser.
        requests: ranged reads in flight.

    Raises:
        ConfigError: that is too little; it says how much is needed.
    """
    places = lanes * window * _PLACE_BYTES
    free = memory - memory // 8 - places
    smallest = min(block, SMALLEST_BLOCK)
    for ahead in range(read_ahead, -1, -1):
        count = lanes * (ahead + 1) + requests + 1
        fitting = min(block, free // (3 * count))
        if fitting >= min(block, _GOOD_BLOCK if ahead > 1 else SMALLEST_BLOCK):
            left = free - count * fitting
            return Shares(fitting, ahead, left * 3 // 4, left // 16, left // 16)
    needed = -(-(places + 3 * smallest * (lanes + requests + 1)) * 8 // 7)
    raise ConfigError(
        "stream.memory",
        f"a worker needs {needed} bytes for {lanes} lanes and windows of {window} samples: raise it, "
        "or lower stream.window, stream.columns or stream.rows",
        value=memory,
    )


class Shelf:
    """What the windows of this process hold, and the way to what did not fit.

    Args:
        held: bytes that windows may hold.
        ahead: bytes of samples that may be read again before they are given.
        fetch: begins to read a sample of a shard again.

    Attributes:
        shared: shards that several of the lanes stride.
        peak: most bytes that were ever on it.
        read_again: bytes of all samples that were read again.
    """

    def __init__(self, held: int, ahead: int, fetch: Fetch) -> None:
        self._room, self._ahead, self._fetch = held, ahead, fetch
        self._held = self._asked = self.peak = self.read_again = 0
        self.shared = SharedShards(self)

    @property
    def used(self) -> int:
        """Bytes that are on it now: of samples in windows, and of those asked for."""
        return self._held + self._asked

    def keep(self, sample: TarSample) -> TarSample:
        """Return the sample as it fits: whole, or without its bytes."""
        return self._put(sample, self._room)

    def lend(self, sample: TarSample) -> TarSample:
        """Return the sample as it fits for a lane that comes later: half the room is for these."""
        return self._put(sample, self._room // 2)

    def _put(self, sample: TarSample, room: int) -> TarSample:
        size = _size(sample)
        if not sample.members or self._held + size > room:
            return replace(sample, members={})
        self._held += size
        self._note()
        return sample

    def release(self, sample: TarSample) -> None:
        """A sample that was kept whole is given: its room is free."""
        self._held -= _size(sample)

    def has_room(self, sample: TarSample) -> bool:
        """Tell whether a sample may be asked for before it is needed."""
        return self._asked + _size(sample) <= self._ahead

    def ask(self, shard: int, sample: TarSample) -> Answer:
        """Begin to read a sample again; the answer waits for it, and must be called once."""
        size = _size(sample)
        self._asked += size
        self.read_again += size
        self._note()
        fetched = self._fetch(shard, sample)

        def answer() -> TarSample | Damage:
            self._asked -= size
            return fetched()

        return answer

    def _note(self) -> None:
        self.peak = max(self.peak, self.used)


def _size(sample: TarSample) -> int:
    return sample.stop - sample.start
