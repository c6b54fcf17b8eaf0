"""The batch norm that GPU ranks share, on CPU ranks; its kernels exist on GPUs alone and are written out.

What is shown is what is done with them; that they do what is written here `ops/certify-gpu` shows on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.ranks import run_ranks
from streamswav.models.shared_norm import QuietSyncBatchNorm

SAMPLES, CHANNELS = 10, 5


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(wide(x), dim=1, correction=0)
    return mean, (variance + eps).rsqrt()


def gather(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share = (counts / counts.sum())[:, None]
    mean = (means * share).sum(0)
    variance = ((inverses**-2 - eps + (means - mean) ** 2) * share).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    return narrow((wide(x) - mean[:, None]) * (inverse * weight)[:, None] + bias[:, None], x)


def reduce(
    outer: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *_: bool
) -> tuple[Tensor, ...]:
    total, weighed = wide(outer).sum(1), (wide(outer) * (wide(x) - mean[:, None])).sum(1)
    return total, weighed, weighed * inverse, total


def backward_elemt(
    outer: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    total: Tensor,
    weighed: Tensor,
    counts: Tensor,
) -> Tensor:
    count, centred = counts.sum(), wide(x) - mean[:, None]
    pulled = wide(outer) - (total[:, None] + centred * (inverse**2 * weighed)[:, None]) / count
    return narrow(pulled * (inverse * weight)[:, None], x)


def wide(x: Tensor) -> Tensor:
    """[C, samples and places]."""
    return x.transpose(0, 1).flatten(1)


def narrow(flat: Tensor, like: Tensor) -> Tensor:
    return flat.view(like.transpose(0, 1).shape).transpose(0, 1)


class Watch(TorchDispatchMode):
    """Finds what would wait for a GPU."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.name() == "aten::index.Tensor" and any(each.dtype == torch.bool for each in args[1])
        self.found += masks or func.name() in ("aten::nonzero", "aten::_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(SAMPLES, CHANNELS, *shape, generator=torch.Generator().manual_seed(1))


def normalised(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    nn.init.normal_(norm.get_parameter("weight"))
    nn.init.normal_(norm.get_parameter("bias"))
    x.requires_grad_()
    output = norm(x)
    (output * x.detach().cos()).sum().backward()
    gradients = {f"gradient of {name}": each.grad for name, each in norm.named_parameters()}
    return {"output": output.detach(), "gradient": x.grad, **gradients, **dict(norm.named_buffers())}  # type: ignore[dict-item]


def on_two_ranks(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    kernels = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    for name, kernel in kernels.items():
        setattr(torch, name, kernel)
    results: dict[str, Any] = {}
    for shape in ((), (4, 3)):
        own = images(shape)[:3] if rank == 0 else images(shape)[3:]
        norm = QuietSyncBatchNorm(CHANNELS)
        norm.group = group
        with Watch() as watch:
            results[str(shape)] = normalised(norm, own)
        results[f"waits {shape}"] = watch.found
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (4, 3))])
def test_it_normalises_by_the_statistics_of_all_ranks(
    two_ranks: list[dict[str, Any]], kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    whole = normalised(kind(CHANNELS), images(shape))
    for name, expected in whole.items():
        found = [result[str(shape)][name] for result in two_ranks]
        if name in ("output", "gradient"):
            actual = torch.cat(found)
        elif name.startswith("gradient of"):
            actual = found[0] + found[1]  # DDP's business
        else:
            assert torch.equal(*found)
            actual = found[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_it_waits_for_nothing(two_ranks: list[dict[str, Any]]) -> None:
    assert [result[f"waits {shape}"] for result in two_ranks for shape in ((), (4, 3))] == [0] * 4


def test_in_eval_mode_it_is_torchs_batch_norm() -> None:
    ours, theirs = QuietSyncBatchNorm(CHANNELS).eval(), nn.BatchNorm2d(CHANNELS).eval()
    ours.running_mean = theirs.running_mean = torch.arange(5.0)
    assert torch.equal(ours(images((4, 3))), theirs(images((4, 3))))
