from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamswav.training.masking import Undo, clear_where

NO, YES = torch.tensor(False), torch.tensor(True)
ODD = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3e38]


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_is_not_a_number_becomes_zero_where_the_mask_is_true(dtype: torch.dtype) -> None:
    tensors = [torch.tensor(ODD, dtype=dtype), torch.ones(2, 2, dtype=dtype)]
    clear_where(tensors, YES)
    assert not any(each.any() for each in tensors)


def test_where_the_mask_is_false_not_a_bit_changes() -> None:
    tensor = torch.tensor(ODD)
    before = bits(tensor)
    clear_where([tensor], NO)
    assert bits(tensor) == before


@pytest.mark.parametrize("mask", [NO, YES])
def test_tensors_come_back_to_the_bit_where_the_mask_is_true(mask: Tensor) -> None:
    tensors = [torch.randn(7), torch.tensor(ODD), torch.tensor(41)]
    undo, before = Undo(tensors), [bits(each) for each in tensors]
    undo.remember()
    for tensor in tensors[:2]:
        tensor.copy_(torch.tensor(ODD[0]).expand_as(tensor))
    tensors[2].add_(1)
    after = [bits(each) for each in tensors]
    undo.where(mask)
    assert [bits(each) for each in tensors] == (before if mask else after)
