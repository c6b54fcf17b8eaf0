"""Optimizers: LARS, and torch's SGD and AdamW behind one configuration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from streamswav.config import OptimizerSection
from streamswav.training.masking import clear_where


class LARS(Optimizer):
    """Layer-wise adaptive rates (You et al., 2017) over SGD with momentum.

    For each tensor p with gradient g, biases and norms included:

        g <- (g + weight_decay * p) * trust * |p| / (|g| + weight_decay * |p| + 1e-8)
        m <- momentum * m + g;  p <- p - lr * m

    A tensor of zero norm takes g as it is; one with zero gradient adds nothing to m. A tensor without a
    gradient (None) stays where it is and keeps its m. Nothing is read from the device. That holds under
    `torch.amp.GradScaler` as well: overflow is masked on the device, with p and m left untouched.

    Args:
        params: tensors or groups of them, each group on one device and of one dtype.
        lr: learning rate; `param_groups` may change it at any step.
        momentum: of the SGD.
        weight_decay: L2 penalty.
        trust: the trust coefficient.
    """

    # Tells GradScaler to hand over `grad_scale` and `found_inf` instead of reading them.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # the base's overloads say the same
        """Move all tensors that have a gradient; `closure`, if any, recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        momentum, lr = group["momentum"], group["lr"]
        updates = self._scaled_gradients(params, group["weight_decay"], group["trust"])
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            skipped = found_inf.squeeze() > 0
            clear_where(updates, skipped)
            momentum, lr = torch.where(skipped, 1.0, momentum), torch.where(skipped, 0.0, lr)
        buffers = [self._momentum_buffer(p) for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        del updates  # as large as the network, and so is the next line's product
        torch._foreach_sub_(params, torch._foreach_mul(buffers, lr))

    def _scaled_gradients(self, params: list[Tensor], weight_decay: float, trust: float) -> list[Tensor]:
        gradients = [p.grad for p in params if p.grad is not None]
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, grad_scale))
        p_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        local_rate = trust * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
        local_rate = torch.where(p_norm == 0, 1.0, torch.where(g_norm == 0, 0.0, local_rate))
        updates = torch._foreach_add(gradients, params, alpha=weight_decay)
        torch._foreach_mul_(updates, local_rate.unbind())
        return list(updates)

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def build_optimizer(section: OptimizerSection, params: Iterable[Any]) -> Optimizer:
    """Build the optimizer that the configuration names; its rate is 0 until a step sets it.

    Args:
        section: name and constants.
        params: tensors, or groups of them with a `weight_decay` of their own and a `rate_scale` for learners.
    """
    params, decay = list(params), section.weight_decay
    if section.name == "lars":
        return LARS(params, 0.0, momentum=section.momentum, weight_decay=decay, trust=section.trust)
    # Their fused kernels mask a step that is not finite on the device; the others would read whether it is.
    if section.name == "sgd":
        sgd = torch.optim.SGD(params, 0.0, momentum=section.momentum, weight_decay=decay, fused=True)
        # The first step may be one that is skipped, or rest some of them.
        for each in itertools.chain.from_iterable(group["params"] for group in sgd.param_groups):
            sgd.state[each]["momentum_buffer"] = torch.zeros_like(each)
        return sgd
    return torch.optim.AdamW(params, 0.0, betas=section.betas, weight_decay=decay, fused=True)
