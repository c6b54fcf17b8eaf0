"""The first samples of the first shard, for all checks that look at the data itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from streamswav.stream.manifest import Shard
from streamswav.stream.store import Store
from streamswav.stream.tar import Damage, TarSample, read_samples

SAMPLES = 64
BLOCK_BYTES = 1 << 20
MOST_BYTES = 64 << 20
_END_BYTES = 1024


@dataclass(frozen=True)
class Specimens:
    """What was read of a shard.

    Attributes:
        shard: whose.
        samples: its first ones.
        damages: stretches among them that could not be parsed.
        ends: whether the shard ends as an archive does, with two empty blocks.
        read: bytes that were read.
    """

    shard: Shard
    samples: tuple[TarSample, ...]
    damages: tuple[Damage, ...]
    ends: bool
    read: int

    @property
    def members(self) -> str:
        """Extensions of the samples' members, the most frequent first."""
        counts = Counter(name for sample in self.samples for name in sample.members)
        return ", ".join(name for name, _ in counts.most_common(5))

    @property
    def mean_bytes(self) -> float:
        """Of a sample in its shard; 0 where there is none."""
        return sum(each.stop - each.start for each in self.samples) / max(1, len(self.samples))


def take_specimens(shard: Shard, store: Store) -> Specimens:
    """Read the first samples of a shard, and its end.

    Raises:
        StorageError: it cannot be read.
    """
    samples: list[TarSample] = []
    damages: list[Damage] = []
    read = [0]
    for each in read_samples(_blocks(shard, store, read), size=shard.size):
        if isinstance(each, Damage):
            damages.append(each)
        else:
            samples.append(each)
        if len(samples) == SAMPLES:
            break
    stop, most = shard.size, min(MOST_BYTES, shard.size)
    if read[0] < stop:  # what was cut off in reading is no damage
        damages = [each for each in damages if each.stop < most]
    end = store.read_range(shard.url, max(0, stop - _END_BYTES), stop, version=shard.version)
    return Specimens(shard, tuple(samples), tuple(damages), end == bytes(_END_BYTES), read[0])


def _blocks(shard: Shard, store: Store, read: list[int]) -> Iterator[bytes]:
    """Yield the shard's bytes, up to a limit; `read` counts them."""
    for start in range(0, min(MOST_BYTES, shard.size), BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, shard.size)
        data = store.read_range(shard.url, start, stop, version=shard.version)
        read[0] += len(data)
        yield data
