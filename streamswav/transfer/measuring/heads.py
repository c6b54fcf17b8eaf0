"""Linear classifiers that are trained side by side on the same features, as though each were alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -1
"""A target that counts for nothing: a class of a multi-label image of which nobody knows."""


@dataclass(frozen=True)
class HeadSettings:
    """How one classifier is trained.

    Attributes:
        rate: learning rate at the start.
        weight_decay: L2 penalty.
    """

    rate: float = 0.3
    weight_decay: float = 1e-6


class HeadBank(nn.Module):
    """H linear classifiers on the same features; one product of matrices gives the scores of all.

    Their losses are added up, so no gradient of one reaches another, and the product is the only thing that
    they share: trained together each comes out as it does alone, up to the rounding of that product. All
    begin with the same weights (small and normal; no bias).

    Args:
        features: F, of an image.
        classes: C.
        settings: of each classifier, in their order.
        seed: of the weights, or a generator on the CPU to draw them from.
        multi: an image may have several classes: each class is a yes or no of its own.

    Attributes:
        heads: the classifiers, H linear layers [C, F].
        settings: of each.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        settings: Sequence[HeadSettings],
        *,
        seed: int | torch.Generator,
        multi: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.multi, self._classes = tuple(settings), multi, classes
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        first = torch.empty(classes, features).normal_(0, 0.01, generator=generator)
        self.heads = nn.ModuleList(_linear(first.clone()) for _ in self.settings)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [H, B, C] of features [B, F]."""
        weights, biases = zip(*((each.weight, each.bias) for each in self.heads), strict=True)
        weight, bias = (_join(parts) for parts in (weights, biases))
        scores = F.linear(features, weight, bias)
        return scores.view(len(features), len(weights), self._classes).transpose(0, 1)

    def loss(self, scores: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the sum over all heads of each one's mean loss over the images.

        Args:
            scores: [H, B, C].
            targets: classes int64 [B]; or shares of the classes, float [B, C]; with `multi` 0 or 1 for each
                class [B, C], or `IGNORED`, the loss of an image then being the sum over its classes.
            label_smoothing: share of the target that is spread over all classes; not with `multi`.
        """
        heads, images, classes = scores.shape
        if self.multi:
            wanted = targets.to(scores.dtype).expand(heads, images, classes)
            counted = (wanted != IGNORED).to(scores.dtype)
            each = F.binary_cross_entropy_with_logits(scores, wanted.clamp(min=0), counted, reduction="none")
            return each.sum(dim=2).mean(dim=1).sum()
        wanted = targets.expand(heads, *targets.shape).flatten(0, 1)
        each = F.cross_entropy(
            scores.reshape(-1, classes), wanted, reduction="none", label_smoothing=label_smoothing
        )
        return each.view(heads, images).mean(dim=1).sum()

    @property
    def layers(self) -> tuple[nn.Linear, ...]:
        """The classifiers, each a linear layer."""
        return tuple(each for each in self.heads if isinstance(each, nn.Linear))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return an optimizer's group for each head: `params`, `lr` (its rate) and `weight_decay`."""
        return [
            {"params": list(head.parameters()), "lr": each.rate, "weight_decay": each.weight_decay}
            for head, each in zip(self.heads, self.settings, strict=True)
        ]


def _linear(weight: Tensor) -> nn.Linear:
    """Return a layer with these weights and no bias yet, drawing no random number."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
