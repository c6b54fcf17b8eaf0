"""Batch norm whose statistics are taken over several ranks, on any device.

torch's SyncBatchNorm exists on GPUs alone. CPU ranks are for tests and small data, where what matters is that
the result does not depend on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def share_statistics(network: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the batch norms of a network take their statistics over the ranks of a group, in place.

    Parameters, buffers and their names stay what they are.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _shared(child, group))


def _shared(norm: _BatchNorm, group: dist.ProcessGroup) -> nn.Module:
    if next(norm.parameters()).device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm, group)  # type: ignore[no-untyped-call]  # torch
        return converted
    shared = SharedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    for name, own in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        setattr(shared, name, own)  # the same objects: an optimizer may hold them already
    shared.group = group
    return shared.train(norm.training)


class SharedBatchNorm(_BatchNorm):
    """Batch norm [M, C, ...] over the samples of all ranks of a group; M may differ between ranks.

    Sums are taken in float64, so that the split among the ranks changes the result by rounding alone.

    Attributes:
        group: the ranks; None: this process alone.
    """

    group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise by the statistics of all ranks; in eval mode by the running ones."""
        if not self.training:
            return super().forward(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self)
        if self.track_running_stats:
            self._take_note(mean, variance, count)
        result: Tensor = output
        return result

    @torch.no_grad()
    def _take_note(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, one all-reduce forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: SharedBatchNorm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        wide = x.double()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = wide.new_full((1,), x.numel() / channels)
        sums = torch.cat([wide.sum(dim=axes), wide.square().sum(dim=axes), count])
        if norm.group is not None:
            dist.all_reduce(sums, group=norm.group)
        mean, squares, count = torch.split(sums, [channels, channels, 1])
        mean = mean / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        scale = (variance + norm.eps).rsqrt()
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.group, ctx.shape, ctx.axes = norm.group, shape, axes
        ctx.mark_non_differentiable(mean, variance, count)
        normal = (wide - mean.view(shape)) * scale.view(shape)
        return (normal * weight.view(shape) + bias.view(shape)).to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape, axes, slope = ctx.shape, ctx.axes, outer[0].double()
        normal = (x.double() - mean.view(shape)) * scale.view(shape)
        by_bias, by_weight = slope.sum(dim=axes), (slope * normal).sum(dim=axes)
        sums = torch.cat([by_bias, by_weight])
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        mean_slope, mean_product = (sums / count).chunk(2)
        inner = slope - mean_slope.view(shape) - normal * mean_product.view(shape)
        return (
            (inner * (weight.double() * scale).view(shape)).to(x.dtype),
            by_weight.to(weight.dtype),
            by_bias.to(weight.dtype),
            None,
        )
