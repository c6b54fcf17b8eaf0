"""Undoing, on the device, what a step that is not finite did: nothing is read to find out whether it was.

NaN times zero is NaN, so a mask cannot be multiplied onto numbers. Onto their bits it can: the integer in
which the bits of a number are, times 0, are the bits of 0.0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def clear_where(tensors: Sequence[Tensor], mask: Tensor) -> None:
    """Set all tensors to 0 where the mask, a boolean scalar on their device, is true."""
    if tensors:
        torch._foreach_mul_([_bits(tensor) for tensor in tensors], _keep(mask, tensors))


class Undo:
    """Remembers tensors, and brings them back where a step turns out not to be finite.

    Args:
        tensors: changed in place by others; they may not be replaced.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_size = defaultdict[int, list[Tensor]](list)
        for tensor in tensors:
            by_size[tensor.element_size()].append(_bits(tensor))
        self._groups = [(bits, [torch.empty_like(each) for each in bits]) for bits in by_size.values()]

    @torch.no_grad()
    def remember(self) -> None:
        """Take note of what the tensors are now."""
        for bits, kept in self._groups:
            torch._foreach_copy_(kept, bits)

    @torch.no_grad()
    def where(self, mask: Tensor) -> None:
        """Bring back what was remembered where the mask, a boolean scalar, is true; to the bit."""
        for bits, kept in self._groups:
            torch._foreach_sub_(bits, kept)
            torch._foreach_mul_(bits, _keep(mask, bits))
            torch._foreach_add_(bits, kept)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def _keep(mask: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return mask.logical_not().to(_INTEGERS[tensors[0].element_size()])
