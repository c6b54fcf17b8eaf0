"""Bringing rows of tensors from all ranks to one, as tensors and piece by piece."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from streamswav.training.distributed import Ranks

_PIECE_BYTES = 64 << 20


def gather_rows(rows: Tensor, order: Tensor | None, counts: list[int], ranks: Ranks) -> Tensor | None:
    """Bring the rows of all ranks to rank 0.

    Rank 0 needs memory for the result and one piece of 64 MiB beside its own rows.

    Args:
        rows: [n, ..] of this rank, on the CPU; the same type and trailing shape on all.
        order: int64 [N] on rank 0: the place in the result of each row, rank by rank; None: as they come.
        counts: number of rows of every rank.
        ranks: that have them.

    Returns:
        [N, ..] on rank 0, None on the others.
    """
    if not ranks.leads:
        for piece in _pieces(rows):
            dist.send(piece, dst=0, group=ranks.control)
        return None
    result = rows.new_empty((sum(counts), *rows.shape[1:]))
    begin = 0
    for rank, count in enumerate(counts):
        own = rows if rank == 0 else rows.new_empty((count, *rows.shape[1:]), device="meta")
        for sent in _pieces(own):
            piece = _receive(sent, rank, ranks) if rank else sent
            places = slice(begin, begin + len(piece))
            result[places if order is None else order[places]] = piece
            begin = places.stop
    return result


def gather_bytes(data: bytes, ranks: Ranks) -> list[bytes]:
    """Return the bytes of all ranks on rank 0, an empty list on the others."""
    sizes = [size for (size,) in ranks.gather((len(data),))]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    whole = gather_rows(own, None, sizes, ranks)
    if whole is None:
        return []
    return [part.numpy().tobytes() for part in torch.split(whole, sizes)]


def _receive(expected: Tensor, rank: int, ranks: Ranks) -> Tensor:
    """Receive a piece that looks like this one, which has no memory."""
    piece = torch.empty(expected.shape, dtype=expected.dtype)
    dist.recv(piece, src=rank, group=ranks.control)
    return piece


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Cut rows into pieces of bounded size; no rows are no piece."""
    if not len(rows):
        return ()
    each = max(1, rows[0].numel() * rows.element_size())
    return tuple(piece.contiguous() for piece in torch.split(rows, max(1, _PIECE_BYTES // each)))
