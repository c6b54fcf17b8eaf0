from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from streamswav.models.shared_norm import SharedBatchNorm


def pair(norm: type[nn.Module], features: int) -> tuple[nn.Module, SharedBatchNorm]:
    """A norm of torch's and ours with the same parameters."""
    torch.manual_seed(0)
    theirs, ours = norm(features), SharedBatchNorm(features)
    nn.init.normal_(theirs.get_parameter("weight"))
    nn.init.normal_(theirs.get_parameter("bias"))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (9, 5)), (nn.BatchNorm2d, (9, 5, 4, 3))])
def test_alone_it_is_torchs_batch_norm(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    theirs, ours = pair(norm, 5)
    found: list[tuple[Tensor, ...]] = []
    for each in (theirs, ours):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = each(x)
        (output * torch.arange(output.numel()).view(shape)).sum().backward()
        gradients = [p.grad for p in each.parameters()]
        found.append((output, x.grad, *gradients, *each.buffers()))  # type: ignore[arg-type]
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_in_eval_mode_it_takes_the_running_statistics() -> None:
    theirs, ours = pair(nn.BatchNorm1d, 4)
    x = torch.randn(6, 4)
    for each in (theirs, ours):
        each(x)
        each.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_half_precision_comes_back_in_half_precision() -> None:
    _, ours = pair(nn.BatchNorm2d, 4)
    assert ours(torch.randn(6, 4, 2, 2).bfloat16()).dtype == torch.bfloat16
