from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamswav.config import Config
from streamswav.errors import ConfigError
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks
from streamswav.training.swav_learner import SwAVLearner

BATCH = 4
STEP: dict[str, Any] = {"rate": 0.05, "freeze_prototypes": False, "use_queue": False}
VALUES: dict[str, Any] = {
    "crops": {"sizes": [16, 8], "counts": [2, 2], "scales": [[0.3, 1.0], [0.1, 0.3]]},
    "model": {"trunk": "resnet10", "width": 0.125, "stem": "small", "head_hidden": 16, "embedding": 8},
    "swav": {"prototypes": 12, "epsilon": 0.05, "iterations": 3, "queue_length": 0},
    "optimizer": {"rate": 0.05},
}


def built(**training: Any) -> SwAVLearner:
    torch.manual_seed(0)
    given = {"batch": BATCH, "precision": "float32", "sync_batch_norm": 0, **training}
    return build_learner(Config.model_validate({**VALUES, "training": given}), Ranks())


def crops(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 * BATCH, 3, size, size, generator=generator) for size in (16, 8)]


def losses(learner: SwAVLearner) -> list[float]:
    return [float(learner.step(crops(seed), **STEP).loss) for seed in range(3)]


def test_half_precision_is_scaled_and_stays_near_float32() -> None:
    half = built(precision="float16")
    assert losses(half)[:2] == pytest.approx(losses(built())[:2], rel=0.05)
    assert half.state_dict()["scaler"]["scale"] > 1


def test_pieces_too_small_for_batch_statistics_are_named() -> None:
    tiny = {**VALUES, "crops": {**VALUES["crops"], "counts": [1, 1]}}
    tiny["model"] = {**VALUES["model"], "stem": "imagenet"}
    training = {"batch": BATCH, "precision": "float32", "sync_batch_norm": 0, "micro_batches": BATCH}
    learner = build_learner(Config.model_validate({**tiny, "training": training}), Ranks())
    with pytest.raises(ConfigError, match=r"training\.batch: too few images at once"):
        learner.step([torch.randn(BATCH, 3, size, size) for size in (16, 8)], **STEP)


def test_where_no_compiler_is_a_trunk_that_is_to_be_compiled_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^training\.compile = True: needs a C compiler"):
        built(compile=True)


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_trunk_takes_the_same_steps_under_the_same_names() -> None:
    plain, compiled = built(), built(compile=True)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert compiled.state_dict()["network"].keys() == plain.state_dict()["network"].keys()


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_trunk_goes_with_pieces_and_checkpointed_blocks() -> None:
    sparing = built(compile=True, micro_batches=2, activation_checkpointing=True)
    assert losses(sparing) == pytest.approx(losses(built(micro_batches=2)), rel=1e-3)
