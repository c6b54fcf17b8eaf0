"""Keys of samples as tables and lists beside the shards name them, and how a sample is found among them.

They are file names or paths, of which the extension is dropped at the first dot, as the shards' readers do.
A sample is found by its whole key (`train/n01440764/10026`), else by the longest end of it that is there:
`n01440764/10026`, then `10026`. So a table may have fewer folders than the shards, not more.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def hash_key(key: str) -> int:
    """Return 64 bits that stand for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def normalise_key(text: str) -> str:
    """Return a path or file name as a sample's key: up to the first dot of the file name."""
    folder, slash, name = text.strip().removeprefix("./").rpartition("/")
    return folder + slash + name.partition(".")[0]


def find_key(hashes: NDArray[np.uint64], key: str) -> int:
    """Return the place of a sample's key among sorted hashes; -1 where it is not there."""
    rest = key
    while True:
        wanted = np.uint64(hash_key(rest))
        place = int(np.searchsorted(hashes, wanted))
        if place < len(hashes) and hashes[place] == wanted:
            return place
        _, slash, rest = rest.partition("/")
        if not slash:
            return -1
