"""Trunk and linear heads, and how fast each part of them learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamswav.config import Config
from streamswav.defaults import known
from streamswav.models import Trunk
from streamswav.models.recompute import features_in_chunks
from streamswav.transfer.measuring.heads import HeadBank, HeadSettings


class FinetuneNetwork(nn.Module):
    """Images [B, 3, S, S] to scores [H, B, C].

    Args:
        trunk: images to features [B, F].
        head: features to scores.
        frozen: the trunk stays in eval mode and has no gradient.

    Attributes:
        chunks: pieces in which a batch goes through the trunk, one after the other, to save memory; the
            trunk's batch statistics are those of a piece.
    """

    def __init__(self, trunk: Trunk, head: HeadBank, *, frozen: bool) -> None:
        super().__init__()
        self.trunk, self.head, self.frozen = trunk, head, frozen
        self.chunks = 1
        trunk.requires_grad_(not frozen)
        self.train()

    def train(self, mode: bool = True) -> FinetuneNetwork:
        """Set the mode; a frozen trunk keeps to eval."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [H, B, C] of images [B, 3, S, S]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = features_in_chunks(self.trunk, images, self.chunks if self.training else 1)
        scores: Tensor = self.head(features)
        return scores


class ScoreRows(nn.Module):
    """The scores of all heads as one row an image [B, H * C]: what an extraction keeps of an image."""

    def __init__(self, network: FinetuneNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return rows [B, H * C] of images [B, 3, S, S]."""
        scores: Tensor = self.network(images)
        return scores.transpose(0, 1).flatten(1)


def head_settings(config: Config) -> list[HeadSettings]:
    """Return the heads of a resolved configuration: each of the rates with each of the weight decays."""
    section = config.finetune
    return [HeadSettings(rate, decay) for rate in section.rates for decay in section.weight_decays]


def parameter_groups(network: FinetuneNetwork, config: Config) -> list[dict[str, Any]]:
    """Return an optimizer's groups, each with its weight decay and `rate_scale`: its rate over the step's.

    With a layer decay d each residual block has d times the rate of the block above it; the last one has
    `optimizer.rate`, and the stem's is one d below the first block's.
    """
    base = known(config.optimizer.rate)
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "rate_scale": group["lr"] / base}
        for group in network.head.parameter_groups()
    ]
    if network.frozen:
        return groups
    decay, weight_decay = config.finetune.layer_decay, config.optimizer.weight_decay
    layers = [list(network.trunk.parameters())] if decay == 1 else _layers(network.trunk)
    return [
        {"params": params, "weight_decay": weight_decay, "rate_scale": decay**below}
        for below, params in enumerate(reversed(layers))
    ] + groups


def _layers(trunk: Trunk) -> Sequence[list[nn.Parameter]]:
    """Parameters of the stem, then of each residual block."""
    blocks = [list(block.parameters()) for block in trunk.blocks()]
    inside = {id(parameter) for block in blocks for parameter in block}
    stem = [parameter for parameter in trunk.parameters() if id(parameter) not in inside]
    return [stem, *blocks]
