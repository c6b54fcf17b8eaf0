"""Swapped prediction: the codes of some crops are predicted from every other crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

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
    Cross entropy is linear in the code, so a crop predicts the sum of its targets at once: one
    log-softmax a crop, not one a pair.

    Args:
        scores: [N, B, K], with gradient.
        codes: [A, B, K] of the assigned crops.
        assigned: which of the N crops the codes belong to.
        temperature: of the softmax over prototypes.

    Returns:
        A scalar, float32 or better.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = scores.new_zeros(())
    for crop, logits in enumerate(scores / temperature):
        others = [code for code, owner in zip(codes, assigned, strict=True) if owner != crop]
        if others:
            total = total + F.cross_entropy(logits, torch.stack(others).sum(dim=0))
    return total / (len(assigned) * (len(scores) - 1))


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
        codes = self._codes(scores.detach(), prototypes.detach(), queue)
        loss = swapped_prediction_loss(scores, codes, assigned=self.assigned, temperature=self.temperature)
        return LossResult(loss, codes)

    def _codes(self, scores: Tensor, prototypes: Tensor, queue: FeatureQueue | None) -> Tensor:
        candidates = scores[list(self.assigned)]
        batch = candidates.shape[1]
        if queue is not None:
            candidates = torch.cat([queue.features @ prototypes.T, candidates], dim=1)
        codes = sinkhorn(candidates, epsilon=self.epsilon, iterations=self.iterations, group=self.group)
        codes = codes[:, -batch:]
        return F.one_hot(codes.argmax(dim=-1), codes.shape[-1]).to(codes.dtype) if self.hard_codes else codes
