"""Counter-based random numbers: what is drawn for a sample depends on its key alone."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniforms(n: int, *key: int | str) -> NDArray[np.float64]:
    """Draw `n` numbers, uniform in [0, 1), as a pure function of `key`.

    Philox is keyed with a hash of `key`; no state is shared between calls, so the order in which samples
    are visited, and by which process, does not matter. The raw bits are used, since NumPy keeps those
    stable across its versions, unlike the distributions built on them.

    Args:
        n: how many numbers.
        key: integers and strings, for example (seed, pass, hash of the shard key, ordinal).

    Returns:
        float64 [n].
    """
    parts = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(n)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
