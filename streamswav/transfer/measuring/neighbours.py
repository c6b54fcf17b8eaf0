"""Exact nearest neighbours by cosine, in bounded memory, with ties in the order of the bank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NOWHERE = torch.iinfo(torch.int64).max
"""Index of a neighbour that is missing; its similarity is -inf."""

# 1024 x 32768 similarities are 128 MiB, as many rows of 2,048 features 256 MiB.
_QUERIES_AT_ONCE = 1024
_BANK_AT_ONCE = 32768
_TILE = 4096
_EDGE = 64


@dataclass(frozen=True)
class Blocks:
    """Shapes of the products, from the sizes of the whole sets.

    The last bits of a product of matrices depend on their shapes. Here every product has the same, filled up
    with zeros: so a pair of images has one similarity, in whatever share and order they come.

    Attributes:
        queries: rows of a block of queries.
        tile: rows of the bank in a product.
        bank: rows of the bank whose similarities are held at once.
    """

    queries: int = _QUERIES_AT_ONCE
    tile: int = _TILE
    bank: int = _BANK_AT_ONCE

    @staticmethod
    def fit(queries: int, bank: int) -> Blocks:
        """Return blocks for so many queries and so large a bank, all ranks' together."""
        tile = min(_TILE, _up(bank, _EDGE))
        return Blocks(min(_QUERIES_AT_ONCE, _up(queries, _EDGE)), tile, _up(min(_BANK_AT_ONCE, bank), tile))


def find_neighbours(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    blocks: Blocks | None = None,
    device: torch.device | str = "cpu",
    alive: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Find the k most similar rows of a bank; of equal ones those that come first.

    The bank goes to the device once, a part at a time.

    Args:
        queries: features [Q, F]; lengths do not matter.
        bank: features [N, F], float32 or float16.
        k: how many; with fewer rows in the bank the rest is `NOWHERE`.
        blocks: shapes of the products; by default those for this bank and these queries.
        device: where similarities are computed and the results are.
        alive: called after every block.

    Returns:
        Cosine similarities float32 [Q, k], best first, and rows of the bank int64 [Q, k].
    """
    blocks = blocks or Blocks.fit(len(queries), len(bank))
    best = torch.full((len(queries), k), -torch.inf, device=device)
    where = torch.full((len(queries), k), NOWHERE, device=device)
    similarities = torch.empty(blocks.queries, blocks.bank, device=device)
    for begin in range(0, len(bank), blocks.bank):
        part = bank[begin : begin + blocks.bank]
        tiles = [_unit_block(tile, blocks.tile, device) for tile in torch.split(part, blocks.tile)]
        for start in range(0, len(queries), blocks.queries):
            rows = slice(start, start + blocks.queries)
            block = _unit_block(queries[rows], blocks.queries, device)
            for tile, out in zip(tiles, torch.split(similarities, blocks.tile, dim=1), strict=False):
                torch.mm(block, tile.T, out=out)
            found, places = top_in_order(similarities[: len(best[rows]), : len(part)], k)
            best[rows], where[rows] = _keep_best(
                torch.cat([best[rows], found], dim=1), torch.cat([where[rows], places + begin], dim=1), k
            )
            alive()
    return best, where


def top_in_order(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row [Q, n], best first, and their columns; of equal ones the first.

    `torch.topk` leaves open which of equal values it takes: rows where that matters are sorted whole.
    """
    k = min(k, values.shape[1])
    found, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (
        found[:, k - 1] == found[:, -1]
        if found.shape[1] > k
        else found.new_zeros(len(found), dtype=torch.bool)
    )
    columns, order = columns[:, :k].sort(dim=1)
    found, columns = _keep_best(found.gather(1, order), columns, k)
    if tied.any():
        rows = tied.nonzero().squeeze(1)
        for some in torch.split(rows, _EDGE):
            every, order = values[some].sort(dim=1, descending=True, stable=True)
            found[some], columns[some] = every[:, :k], order[:, :k]
    return found, columns


def merge(similarities: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of neighbours [Q, n] that were found in several places, in the order of the bank."""
    indices, order = indices.sort(dim=1, stable=True)
    return _keep_best(similarities.gather(1, order), indices, k)


def _keep_best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort rows by value and cut them; equal values stay as they are."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order)[:, :k]


def _unit_block(rows: Tensor, size: int, device: torch.device | str) -> Tensor:
    """Bring rows to unit length, and to a block of `size` by rows of zeros."""
    unit = F.normalize(rows.to(device, torch.float32), dim=1)
    return unit if len(unit) == size else F.pad(unit, (0, 0, 0, size - len(unit)))


def _up(number: int, step: int) -> int:
    return -(-max(1, number) // step) * step
