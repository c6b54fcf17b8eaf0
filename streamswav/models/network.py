"""The network that is trained: trunk, projection head, prototypes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamswav.config import ModelSection
from streamswav.models.recompute import features_in_chunks
from streamswav.models.trunk import build_trunk


class ProjectionHead(nn.Sequential):
    """From features [M, F] to embeddings before normalisation [M, D] (paper, appendix A.1).

    Linear, BatchNorm1d, ReLU, Linear. Without batch norm its place is kept, so that the last layer is
    always number 3.

    Args:
        features: F.
        hidden: width between the two layers; 0 means a single linear layer.
        embedding: D.
        batch_norm: normalise the hidden layer.
    """

    def __init__(self, features: int, hidden: int, embedding: int, *, batch_norm: bool = True) -> None:
        if hidden == 0:
            super().__init__(nn.Linear(features, embedding))
            return
        super().__init__(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden) if batch_norm else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, embedding),
        )


class Prototypes(nn.Linear):
    """Prototypes [K, D] as a linear layer without bias: unit embeddings [M, D] to scores [M, K]."""

    def __init__(self, embedding: int, prototypes: int) -> None:
        super().__init__(embedding, prototypes, bias=False)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Bring every prototype to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


class SwAVNetwork(nn.Module):
    """Crops to unit embeddings and prototype scores.

    Args:
        trunk: maps images [M, 3, S, S] to features [M, F].
        projection_head: maps features [M, F] to [M, D].
        prototypes: maps embeddings [M, D] to scores [M, K].

    Attributes:
        chunks: pieces in which the images of a resolution go through the trunk, one after the other. The
            trunk's batch statistics are those of a piece. Head, prototypes, codes and loss see the whole
            batch, so the gradient is the whole batch's but for those statistics; accumulating the gradients
            of small batches would change the codes.
    """

    def __init__(self, trunk: nn.Module, projection_head: nn.Module, prototypes: Prototypes) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection_head = projection_head
        self.prototypes = prototypes
        self.chunks = 1

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embed all crops, one pass through the trunk a resolution and one through the head.

        Lengths and scores are computed in the parameters' precision, whatever the autocast.

        Args:
            crops: float tensors [n_i * B, 3, S_i, S_i], crop-major; neighbours of one size are joined,
                since batch statistics are taken over them together.

        Returns:
            Unit embeddings [N * B, D] and scores [N * B, K], crop-major, with N the sum of the n_i.
        """
        chunks = self.chunks if self.training else 1
        features = torch.cat([features_in_chunks(self.trunk, each, chunks) for each in _join_sizes(crops)])
        projected = self.projection_head(features)
        with torch.autocast(projected.device.type, enabled=False):
            embeddings = F.normalize(projected.to(self.prototypes.weight.dtype), dim=1)
            return embeddings, self.prototypes(embeddings)


def build_network(section: ModelSection, *, prototypes: int) -> SwAVNetwork:
    """Build the network that the configuration describes, with K `prototypes`.

    Raises:
        ConfigError: as `build_trunk`.
    """
    trunk = build_trunk(section)
    head = ProjectionHead(
        trunk.feature_dim, section.head_hidden, section.embedding, batch_norm=section.head_batch_norm
    )
    return SwAVNetwork(trunk, head, Prototypes(section.embedding, prototypes))


def _join_sizes(crops: Iterable[Tensor]) -> Iterable[Tensor]:
    for _, run in itertools.groupby(crops, key=lambda images: images.shape[1:]):
        same = list(run)
        yield torch.cat(same) if len(same) > 1 else same[0]
