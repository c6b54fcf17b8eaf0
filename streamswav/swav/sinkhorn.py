"""Online codes by the Sinkhorn-Knopp algorithm (paper, section 3.1, equations 3 to 5)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Assign samples softly to prototypes so that each prototype receives a nearly equal share.

    The paper scales the rows and then the columns of exp(scores / epsilon), `iterations` times. Constant
    factors cancel in the samples' normalisation, which comes last. So one vector over the prototypes
    is all there is to find, and of the ranks only its sums are communicated: `iterations` + 1
    all-reduces of K values for each leading dimension. As every sample's normalisation is a softmax,
    nothing overflows, and each prototype keeps a mass of at least 1/K: nothing vanishes either.

    Args:
        scores: similarities of B samples to K prototypes [..., B, K], of any floating type. Leading
            dimensions are independent problems. B may differ between ranks.
        epsilon: weight of the entropy; smaller means sharper.
        iterations: how often prototypes and samples are normalised; 0 leaves the softmax alone.
        group: ranks that share one problem, each with its own samples; None: this process alone.

    Returns:
        Codes [..., B, K], float32 (float64 for such scores), that sum to 1 for each sample.

    Raises:
        ValueError: an epsilon that is not above 0, or iterations below 0.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, not {iterations}")
    precision = torch.promote_types(scores.dtype, torch.float32)
    if iterations == 0:
        return torch.softmax(scores.double() / epsilon, dim=-1).to(precision)
    highest = _all_reduce(scores.amax(dim=-2, keepdim=True).to(precision), dist.ReduceOp.MAX, group)
    # Dividing by epsilon magnifies the rounding of these differences; they alone need more than float32.
    wide = (scores - highest.double()).div_(epsilon)
    mass = wide.to(precision, copy=True).exp_()
    logits = wide.sub_(wide.amax(dim=-1, keepdim=True)).to(precision)
    del wide
    log_scale, shifted = torch.zeros_like(highest, dtype=torch.float64), torch.empty_like(logits)
    for _ in range(iterations):
        log_scale -= _all_reduce(mass.sum(dim=-2, keepdim=True).double(), dist.ReduceOp.SUM, group).log()
        log_scale -= log_scale.mean(dim=-1, keepdim=True)
        torch.add(logits, log_scale.to(precision), out=shifted)
        torch.softmax(shifted, dim=-1, out=mass)
    return mass


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, op, group=group)
    return values
