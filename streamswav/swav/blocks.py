"""Large matrices a few rows at a time, so that what is done to a row is done while it is in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_CPU_ELEMENTS = 1 << 18  # 1 MiB of float32: the second-level cache of a core
_CPU_ROWS = 128  # sums over so many rows lose nothing in float32
_DEVICE_ELEMENTS = 1 << 24  # a GPU wants few, large kernels; this bounds the memory of temporaries


def row_blocks(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of blocks of rows that cover a matrix [B, K]."""
    rows, columns = matrix.shape
    if matrix.device.type == "cpu":
        size = min(_CPU_ROWS, _CPU_ELEMENTS // columns)
    else:
        size = _DEVICE_ELEMENTS // columns
    size = max(1, size)
    for begin in range(0, rows, size):
        yield begin, min(rows, begin + size)
