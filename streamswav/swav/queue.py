"""The queue of past embeddings that fills small batches (paper, section 3.1 and appendix A.6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamswav.errors import ConfigError


def usable_length(length: int, global_batch: int) -> int:
    """Cut a queue's length over all ranks down to a multiple of the global batch.

    Raises:
        ConfigError: a length other than 0 that is shorter than the batch.
    """
    if 0 < length < global_batch:
        reason = f"shorter than the global batch ({global_batch}): the queue would be empty; 0 means none"
        raise ConfigError("swav.queue_length", reason, value=length)
    return length - length % global_batch


class FeatureQueue(nn.Module):
    """Unit embeddings of past batches of this rank, one queue an assigned crop, the newest first.

    Args:
        length: embeddings an assigned crop on this rank.
        dim: D.
        crops: number of assigned crops A.

    Attributes:
        features: [A, length, D], zeros where nothing was pushed yet.
    """

    features: Tensor

    def __init__(self, *, length: int, dim: int, crops: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(crops, length, dim))
        self._pushed = 0
        self.register_load_state_dict_post_hook(FeatureQueue._count)  # type: ignore[no-untyped-call]  # torch's

    @property
    def full(self) -> bool:
        """Whether the last slot is filled; counted here, since reading the features would wait for them."""
        return self._pushed >= self.features.shape[1]

    @property
    def fill(self) -> float:
        """Share of the slots that are filled."""
        return min(1.0, self._pushed / self.features.shape[1])

    @torch.no_grad()
    def push(self, embeddings: Tensor, *, unless: Tensor | None = None) -> None:
        """Put a batch [A, B, D] in front; as many of the oldest embeddings fall out.

        Where `unless`, a boolean scalar on the device, is true the queue stays as it is. Nobody waits to
        know: the batch counts as pushed until `take_back` says otherwise.
        """
        length = self.features.shape[1]
        pushed = torch.cat([embeddings, self.features], dim=1)[:, :length]
        self.features.copy_(pushed if unless is None else torch.where(unless, self.features, pushed))
        self._pushed += embeddings.shape[1]

    def take_back(self, embeddings: int) -> None:
        """Count so many embeddings as not pushed after all: their steps were skipped."""
        self._pushed -= embeddings

    def _count(self, _: Any) -> None:
        """After loading: unit embeddings are never zero, so what is not zero was pushed."""
        self._pushed = int(self.features[0].any(dim=1).sum())
