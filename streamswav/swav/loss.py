"""Swapped prediction: the codes of some crops are predicted from every other crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from streamswav.swav.blocks import row_blocks
from streamswav.swav.queue import FeatureQueue
from streamswav.swav.sinkhorn import sinkhorn


@dataclass(frozen=True)
class LossResult:
    """The loss of one batch, a scalar on the device, and the codes [A, B, K] it was computed from."""

    loss: Tensor
    codes: Tensor


def swapped_prediction_loss(
    scores: Tensor, codes: Tensor, *, assigned: Sequence[int], temperature: float
) -> Tensor:
    """Cross entropy of codes with the predictions of the other crops (paper, equations 2 and 6).

    It is the mean over the batch, over the N - 1 crops that predict, and over the A assigned crops.
    Cross entropy is linear in the code, so a crop predicts the sum of its targets at once: one softmax a
    crop, not one a pair. Its gradient is a by-product of that softmax and is kept for the backward pass,
    which may therefore run once.

    Args:
        scores: [N, B, K], with gradient.
        codes: [A, B, K] of the assigned crops.
        assigned: which of the N crops the codes belong to.
        temperature: of the softmax over prototypes.

    Returns:
        A scalar, float32 or better.

    Raises:
        ValueError: fewer than two crops, or assigned crops that are not among them.
    """
    if not assigned or len({*assigned}) != len(assigned) or not {*assigned} <= {*range(len(scores))}:
        raise ValueError(f"assigned must name some of the {len(scores)} crops, each once, not {assigned}")
    if len(scores) < 2:
        raise ValueError("swapped prediction needs at least two crops")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    loss: Tensor = _SwappedPrediction.apply(scores, codes, tuple(assigned), temperature)
    return loss


class _SwappedPrediction(torch.autograd.Function):
    """The loss and its gradient in one pass over the scores, a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, codes: Tensor, assigned: tuple[int, ...], temperature: float
    ) -> Tensor:
        crops, batch, _ = scores.shape
        weight = 1 / (len(assigned) * (crops - 1) * batch)
        gradient = torch.empty_like(scores)
        total = torch.zeros((), dtype=torch.float64, device=scores.device)
        slope = weight / temperature
        for begin, end in row_blocks(scores[0]):
            owned = dict(zip(assigned, codes[:, begin:end], strict=True))
            everything = codes[:, begin:end].sum(dim=0)
            for crop in range(crops):
                target = everything - owned[crop] if crop in owned else everything
                mass = target.sum(dim=-1, keepdim=True)
                out, rows = gradient[crop, begin:end], scores[crop, begin:end]
                torch.sub(rows, rows.amax(dim=-1, keepdim=True), out=out).mul_(1 / temperature)
                agreement = torch.linalg.vecdot(target, out)
                normaliser = out.exp_().sum(dim=-1, keepdim=True)
                losses = mass.mul(normaliser.log()).squeeze(-1) - agreement
                total += losses.sum(dtype=torch.float64)
                out.mul_(slope * mass / normaliser).sub_(target, alpha=slope)
        ctx.gradient = gradient
        return (total * weight).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        gradient: Tensor | None = ctx.gradient
        if gradient is None:
            raise RuntimeError("swapped_prediction_loss keeps its gradient for one backward pass only")
        ctx.gradient = None  # it may be gigabytes
        return gradient.mul_(outer[0]), None, None, None


@dataclass(frozen=True, kw_only=True)
class SwAVLoss:
    """The objective: codes from the assigned crops and the queue, then swapped prediction.

    Attributes:
        epsilon: of Sinkhorn.
        iterations: of Sinkhorn.
        temperature: of the softmax over prototypes.
        assigned: the crops whose codes are predicted.
        hard_codes: round each code to its best prototype (paper, appendix C.3).
        group: ranks whose samples share the prototypes evenly; None: this process alone.
    """

    epsilon: float = 0.05
    iterations: int = 3
    temperature: float = 0.1
    assigned: tuple[int, ...] = (0, 1)
    hard_codes: bool = False
    group: dist.ProcessGroup | None = None

    def __call__(self, scores: Tensor, prototypes: Tensor, queue: FeatureQueue | None = None) -> LossResult:
        """Compute codes and loss of one batch.

        Args:
            scores: [N, B, K], with gradient.
            prototypes: [K, D], by which the queue is scored anew.
            queue: past embeddings that take part in the assignment; None while there are none.
        """
        codes = self.codes(scores.detach(), prototypes.detach(), queue)
        return LossResult(self.loss(scores, codes), codes)

    def loss(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Return the loss of scores [N, B, K], with gradient, for given codes [A, B, K]."""
        return swapped_prediction_loss(scores, codes, assigned=self.assigned, temperature=self.temperature)

    def codes(self, scores: Tensor, prototypes: Tensor, queue: FeatureQueue | None = None) -> Tensor:
        """Return the codes [A, B, K] of a batch, without gradient; arguments as of the whole."""
        candidates = torch.stack(
            [scores[crop] for crop in self.assigned]
        )  # a list as index would be sent over
        batch = candidates.shape[1]
        if queue is not None:
            with torch.autocast(scores.device.type, enabled=False):  # as the batch's scores
                past = queue.features @ prototypes.T
            candidates = torch.cat([past, candidates], dim=1)
        codes = sinkhorn(
            candidates,
            epsilon=self.epsilon,
            iterations=self.iterations,
            rows=batch,
            inplace=True,  # the candidates are a copy
            group=self.group,
        )
        return F.one_hot(codes.argmax(dim=-1), codes.shape[-1]).to(codes.dtype) if self.hard_codes else codes
