"""`training.deterministic`: two runs of the same command end in the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, differences, run, state_of

from streamswav.errors import EXIT_DONE
from streamswav.training.distributed import compute_repeatably

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def trained(folder: Path, shards: Path, **stream: int) -> dict[str, Any]:
    """The state of a run on two threads, with work enough for both."""
    given = arguments(
        run={"directory": folder / "run"},
        stream={"urls": shards, "samples": 64, **stream},
        swav={"queue_length": 32, "queue_start_images": 16, "freeze_prototypes_images": 32},
        crops={"sizes": "[32, 16]"},
        model={"width": 0.25},
        loader={"workers": 1},
        training={"threads": 2, "deterministic": "true"},
    )
    outcome = run(given, folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return state_of(folder / "run")


def test_two_runs_on_two_threads_end_in_the_same_bits(make_shards: Any, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", counts=[32, 32], labels=False)
    first, second = (trained(tmp_path / name, tmp_path / "shards") for name in ("first", "second"))
    assert differences(first, second) == []
    other = trained(tmp_path / "other", tmp_path / "shards", seed=1)
    assert "model.pt/.network.trunk.conv1.weight" in differences(first, other)


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
