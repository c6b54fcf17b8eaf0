"""Counter-based random numbers: what is drawn for a sample depends on its key alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


def words(n: int, *key: int | str) -> NDArray[np.uint64]:
    """Draw `n` random words of 64 bits as a pure function of `key`.

    Philox is keyed with a hash of `key`; no state is shared between calls, so the order in which samples
    are visited, and by which process, does not matter. The raw bits are used, since NumPy keeps those
    stable across its versions, unlike the distributions built on them.

    Args:
        n: how many words.
        key: integers and strings, for example (seed, pass, hash of the shard key, ordinal).

    Returns:
        uint64 [n].
    """
    philox = np.random.Philox(_Hash(key))  # type: ignore[arg-type]  # NumPy's stubs forget ISeedSequence
    raw: NDArray[np.uint64] = philox.random_raw(n)
    return raw


def uniforms(n: int, *key: int | str) -> NDArray[np.float64]:
    """Draw `n` numbers, float64 [n], uniform in [0, 1), as `words` does."""
    return (words(n, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *key: int | str) -> list[int]:
    """Draw an order of range(n), as `words` does."""
    return [int(i) for i in np.argsort(words(n, *key), kind="stable")]


class _Hash(ISeedSequence):
    """Hands Philox its key. Given as `key=`, Philox would first ask the system for entropy it never uses."""

    def __init__(self, key: tuple[int | str, ...]) -> None:
        parts = tuple(part if isinstance(part, str) else int(part) for part in key)
        self._digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[Any]:
        assert (n_words, dtype) == (2, np.uint64)
        return np.frombuffer(self._digest, "<u8").astype(np.uint64)
