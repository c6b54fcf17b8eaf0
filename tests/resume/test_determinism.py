"""`training.deterministic`: two runs of the same command end in the same bits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, differences, run, state_of
from tiny_run import PROTOTYPES, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from streamswav.errors import EXIT_DONE
from streamswav.models import build_network
from streamswav.swav import FeatureQueue, SwAVLoss
from streamswav.training.distributed import compute_repeatably
from streamswav.training.optim import LARS
from streamswav.training.swav_learner import SwAVLearner

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def trained(folder: Path, shards: Path) -> dict[str, Any]:
    """The state of a run on two threads, with work enough for both."""
    given = arguments(
        run={"directory": folder / "run"},
        stream={"urls": shards, "samples": 48},
        swav={"queue_length": 16, "queue_start_images": 0, "freeze_prototypes_images": 16},
        crops={"sizes": "[24, 16]"},
        model={"width": 0.25},
        loader={"workers": 1},
        training={"threads": 2, "deterministic": "true"},
    )
    outcome = run(given, folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return state_of(folder / "run")


def test_two_runs_on_two_threads_end_in_the_same_bits(make_shards: Any, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", counts=[24, 24], labels=False)
    first, second = (trained(tmp_path / name, tmp_path / "shards") for name in ("first", "second"))
    assert differences(first, second) == []


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize(
    ("given", "then"), [(None, ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8"), (":4096:8", ":4096:8")]
)
def test_gpu_libraries_are_told_and_tf32_is_left_alone(
    settings: pytest.MonkeyPatch, given: str | None, then: str
) -> None:
    if given is None:
        settings.delenv(VARIABLE)
    else:
        settings.setenv(VARIABLE, given)
    torch.backends.cudnn.benchmark = True
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    compute_repeatably()
    assert os.environ[VARIABLE] == then
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == tf32


# torch's own list (`torch.use_deterministic_algorithms`) of what it has no repeatable kernel for on a GPU.
NOT_REPEATABLE = (
    r"adaptive_(avg_pool[23]d|max_pool2d)_backward|avg_pool3d_backward|fractional_max_pool|max_unpool"
    r"|upsample_(linear|bilinear|bicubic|trilinear).*_backward|reflection_pad.*_backward|nll_loss|ctc_loss"
    r"|embedding_bag|put_?$|histc|bincount|median|grid_sampler.*_backward|scatter_reduce|kthvalue"
)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::").partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hard", [False, True])
def test_a_step_uses_nothing_that_has_no_repeatable_kernel_on_a_gpu(hard: bool) -> None:
    network = build_network(tiny_config(stem="imagenet").model, prototypes=PROTOTYPES)
    optimizer, queue = LARS(network.parameters(), 0.0), FeatureQueue(length=8, dim=8, crops=2)
    student = SwAVLearner(network, SwAVLoss(hard_codes=hard), optimizer, crops=3, queue=queue)
    with Operations() as seen:
        for _ in range(3):
            crops = [torch.randn(count * 8, 3, size, size) for count, size in ((2, 64), (1, 32))]
            student.step(crops, rate=0.1, freeze_prototypes=False, use_queue=True)
    assert {"max_pool2d_with_indices_backward", "convolution_backward", "mean"} <= seen.names
    assert [name for name in sorted(seen.names) if re.match(NOT_REPEATABLE, name)] == []
