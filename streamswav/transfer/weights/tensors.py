"""Tensors by name: out of nested containers, checked, and put into modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from streamswav.errors import CheckpointError

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Module = TypeVar("Module", bound=nn.Module)

_LONGEST = 600

COUNTER = "num_batches_tracked"
"""Of a batch norm; missing in files from before torch 0.4.1, and of no effect on features."""

_VARIANCE = "running_var"


def flatten(content: Any) -> Tensors:
    """Name the tensors in nested containers by their path, joined by dots.

    A container that recurs is entered once, so that nothing grows beyond what was read.

    Raises:
        CheckpointError: there are none.
    """
    found: Tensors = {}
    entered: set[int] = set()
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            found[name] = value.detach()
        elif isinstance(value, Mapping | list | tuple) and id(value) not in entered:
            entered.add(id(value))
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            stack += [(f"{name}.{key}" if name else str(key), each) for key, each in reversed(items)]
    if not found:
        raise CheckpointError(f"there are no tensors in it, only {_kind(content)}")
    return found


def one_line(text: str) -> str:
    """Bring a message to one line of readable length, whatever names a file has put into it."""
    shown = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def to_float(tensors: Mapping[str, Tensor], source: str) -> Tensors:
    """Return copies in float32, contiguous and finite; counters of batch norms stay whole numbers.

    Raises:
        CheckpointError: a tensor that holds no weights: whole or complex numbers, NaN, infinity, variances
            below 0, or one value repeated without taking room, which could be any number of them.
    """
    return {name: _to_float(name, tensor, source) for name, tensor in tensors.items()}


def fill(module: Module, state: Mapping[str, Tensor]) -> Module:
    """Give a module its tensors, not copies of them, and return it in eval mode.

    Counters of batch norms that are not there begin at 0. All else has to be there, in its shape.
    """
    zeros = {
        name: torch.zeros((), dtype=torch.int64) for name in module.state_dict() if name.endswith(COUNTER)
    }
    module.load_state_dict({**zeros, **state}, assign=True)
    module.eval()
    return module


def _to_float(name: str, tensor: Tensor, source: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"{source}: {name} is a tensor without plain values (sparse, quantised or empty)"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        shown = f"{tensor.numel():,} values, of which the file holds fewer"
        raise CheckpointError(f"{source}: {name} claims {shown}")
    if name.endswith(COUNTER):
        return tensor.to(torch.int64, copy=True)
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{source}: {name} holds {kind}, where weights are floating-point numbers")
    copied = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    # The sum is not finite where a summand is not, and takes a fraction of the time.
    if not copied.sum().isfinite() and (count := int(copied.isfinite().logical_not().sum())):
        raise CheckpointError(f"{source}: {name} holds {count:,} values that are NaN or infinite")
    if name.endswith(_VARIANCE) and (copied < 0).any():
        raise CheckpointError(f"{source}: {name} holds negative numbers, where variances are")
    return copied


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"a dictionary of {', '.join(map(str, list(content)[:3])) or 'nothing'}"
