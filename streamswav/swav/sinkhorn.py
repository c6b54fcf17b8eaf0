"""Online codes by the Sinkhorn-Knopp algorithm (paper, section 3.1, equations 3 to 5)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from streamswav.swav.blocks import row_blocks

_COARSEST = 0.05
"""From this epsilon on float32 keeps the codes right to 5e-7: dividing by less magnifies its rounding."""

_PERIOD = 5
"""Iterations after which the scaling is taken up into the exponentials, before float32 runs out of range."""


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    rows: int | None = None,
    inplace: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Assign samples softly to prototypes so that each prototype receives a nearly equal share.

    The paper scales the rows and then the columns of exp(scores / epsilon), `iterations` times. Here that
    matrix is never rescaled: it is diag(c) M diag(r) throughout, with M computed once and one vector for the
    prototypes, r = 1 / (M^T c), and one for the samples, c = 1 / (M r). Constant factors cancel in c, which
    comes last. Of the ranks only sums are communicated: `iterations` + 1 all-reduces of K values for each
    leading dimension, whatever the number of samples.

    M is taken relative to the maximum of each prototype over all ranks and of each sample, so that every
    row and, at first, every column has an entry of 1: nothing overflows, and no sum vanishes.

    Args:
        scores: similarities of B samples to K prototypes [..., B, K], of any floating type. Leading
            dimensions are independent problems. B may differ between ranks, and be 0.
        epsilon: weight of the entropy; smaller means sharper.
        iterations: how often prototypes and samples are normalised; 0 leaves the softmax alone.
        rows: return the codes of so many samples at the end of each problem only; None: of all.
        inplace: the scores may be overwritten, and the codes returned in their memory.
        group: ranks that share one problem, each with its own samples; None: this process alone.

    Returns:
        Codes [..., rows, K], float32 (float64 for such scores), that sum to 1 for each sample.

    Raises:
        ValueError: an epsilon that is not above 0, iterations below 0, or more rows than there are.
    """
    batch, prototypes = scores.shape[-2:]
    rows = batch if rows is None else rows
    _check(epsilon, iterations, rows, batch)
    precision = torch.promote_types(scores.dtype, torch.float32)
    if iterations == 0:
        return torch.softmax(scores[..., batch - rows :, :].double() / epsilon, dim=-1).to(precision)
    problems = scores.reshape(math.prod(scores.shape[:-2]), batch, prototypes)
    reusable = inplace and scores.dtype == precision and iterations <= _PERIOD
    matrix = problems if reusable else torch.empty_like(problems, dtype=precision)
    exact = epsilon < _COARSEST or iterations > _PERIOD
    working = torch.float64 if exact else precision
    offset = -_all_reduce(_highest(problems).to(precision), dist.ReduceOp.MAX, group).double()
    scale = torch.ones_like(offset)
    for turn in range(iterations):
        if turn % _PERIOD:
            sums = _sum_columns(matrix, scale.to(precision))
        else:
            offset = offset + epsilon * scale.log()
            sums = _exponentiate(problems, offset.to(working), matrix, epsilon, first=turn == 0)
        scale = _all_reduce(sums, dist.ReduceOp.SUM, group).reciprocal_()
        scale /= scale.mean(dim=-1, keepdim=True)  # of no effect on the codes; keeps within float32
    codes = _scale(matrix[:, batch - rows :], scale.to(precision))
    return codes.reshape(*scores.shape[:-2], rows, prototypes)


def _check(epsilon: float, iterations: int, rows: int, batch: int) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, not {iterations}")
    if not 0 <= rows <= batch:
        raise ValueError(f"rows must be 0 to {batch}, the number of samples, not {rows}")


def _highest(problems: Tensor) -> Tensor:
    """The maximum of each prototype [A, K] over this rank's samples."""
    if problems.shape[1] == 0:
        return problems.new_full((problems.shape[0], problems.shape[2]), -torch.inf)
    return problems.amax(dim=1)


def _exponentiate(problems: Tensor, offset: Tensor, matrix: Tensor, epsilon: float, *, first: bool) -> Tensor:
    """Fill `matrix` with M = exp((scores + offset - maximum of the sample) / epsilon); return M^T c.

    At first no sample has been normalised: c takes the maximum back. Later c = 1 / (M 1).
    """
    sums = torch.zeros_like(offset, dtype=torch.float64)
    for problem, begin, end in _blocks(problems):
        out = matrix[problem, begin:end]
        shifted = problems[problem, begin:end].to(offset.dtype, copy=True).add_(offset[problem])
        highest = shifted.amax(dim=-1, keepdim=True)
        out.copy_(shifted.sub_(highest)).mul_(1 / epsilon).exp_()
        if first:
            weights = highest.mul_(1 / epsilon).exp_().to(out.dtype).squeeze(-1)
        else:
            weights = out.sum(dim=-1).reciprocal_()
        sums[problem] += torch.mv(out.t(), weights)
    return sums


def _sum_columns(matrix: Tensor, scale: Tensor) -> Tensor:
    """Return M^T c with c = 1 / (M r), in one pass over M; float64, of partial sums in M's type."""
    sums = torch.zeros_like(scale, dtype=torch.float64)
    for problem, begin, end in _blocks(matrix):
        block = matrix[problem, begin:end]
        sums[problem] += torch.mv(block.t(), torch.mv(block, scale[problem]).reciprocal_())
    return sums


def _scale(matrix: Tensor, scale: Tensor) -> Tensor:
    """Turn M into the codes diag(c) M diag(r), in place."""
    for problem, begin, end in _blocks(matrix):
        block = matrix[problem, begin:end].mul_(scale[problem])
        block.mul_(block.sum(dim=-1, keepdim=True).reciprocal_())
    return matrix


def _blocks(matrices: Tensor) -> Iterator[tuple[int, int, int]]:
    """Problem, first and last row of each block of the matrices [A, B, K]."""
    for problem in range(matrices.shape[0]):
        for begin, end in row_blocks(matrices[problem]):
            yield problem, begin, end


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, op, group=group)
    return values
