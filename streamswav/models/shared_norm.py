"""Batch norm whose statistics are taken over several ranks, on any device.

On GPUs it is torch's SyncBatchNorm, but for a wait in each of its forward passes; that exists on GPUs alone.
CPU ranks are for tests and small data, where what matters is that the result does not depend on how many
there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import _functions
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
    on_gpu = next(norm.parameters()).device.type == "cuda"
    kind = QuietSyncBatchNorm if on_gpu else SharedBatchNorm
    shared = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, own in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        setattr(shared, name, own)  # the same objects: an optimizer may hold them already
    shared.group = group
    return shared.train(norm.training)


class _OverRanks(_BatchNorm):
    """A batch norm that takes its statistics over ranks while it is trained.

    Attributes:
        group: the ranks; None: this process alone.
    """

    group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise by the statistics of all ranks; in eval mode by the running ones."""
        return self._over_ranks(input) if self.training else super().forward(input)

    def _over_ranks(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class QuietSyncBatchNorm(_OverRanks):
    """torch's SyncBatchNorm for ranks of which none is without samples; nothing is read from the device.

    torch's own leaves out ranks without samples, for which it reads from the device in each forward pass how
    many have some.
    """

    def _over_ranks(self, images: Tensor) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        output: Tensor = _Synchronised.apply(
            images,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            self.group,
            dist.get_world_size(self.group),
        )
        return output


class _Synchronised(_functions.SyncBatchNorm):
    """torch's own forward pass without the search for ranks that are empty; backward is torch's."""

    @staticmethod
    def forward(  # noqa: PLR0917 - torch's
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
        world_size: int,
    ) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        channels = x.shape[1]
        mean, inverse = torch.batch_norm_stats(x, eps)
        own = torch.cat([mean, inverse, mean.new_full((1,), x.numel() // channels)])
        everything = own.new_empty(world_size * own.numel())
        dist.all_gather_into_tensor(everything, own, group)
        means, inverses, counts = torch.split(everything.view(world_size, -1), channels, dim=1)
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means, inverses, running_mean, running_var, momentum, eps, counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.to(torch.int32))
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)


class SharedBatchNorm(_OverRanks):
    """Batch norm [M, C, ...] over the samples of all ranks of a group; M may differ between ranks.

    Sums are taken in float64, so that the split among the ranks changes the result by rounding alone.
    """

    def _over_ranks(self, images: Tensor) -> Tensor:
        output, mean, variance, count = _Normalise.apply(images, self.weight, self.bias, self)
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
