"""Tensors of uneven length between ranks: by the group of the device, never pickled."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from streamswav.training.distributed import Ranks


def all_rows(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return every rank's rows [n, ...] on all ranks, on their device; n may differ, and be 0.

    Costs one gather of the counts and one of the rows, each filled up to the longest.
    """
    tensor = tensor.to(ranks.device)
    if ranks.group is None:
        return [tensor]
    counts = ranks.gather(len(tensor))
    padded = _pad(tensor, max(counts))
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group=ranks.group)
    return [part[:count] for part, count in zip(found, counts, strict=True)]


def rows_to(owner: int, tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return every rank's tensor on the rank that is the owner, an empty list on others; shapes are equal."""
    if ranks.group is None:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(ranks.world_size)] if ranks.rank == owner else None
    dist.gather(tensor.contiguous(), found, dst=owner, group=ranks.group)
    return found or []


def _pad(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)).contiguous()
