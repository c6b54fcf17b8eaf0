"""Short runs in this process, healthy and not: what they read and what the verdict on them is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from streamswav.config import parse_config
from streamswav.crops import Augment
from streamswav.telemetry.remedies import settings_of
from streamswav.telemetry.verdict import Judge, Moment, Thresholds
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks
from streamswav.training.pace import Stride
from streamswav.training.pretraining import Calendar, Pretraining

BATCH, KINDS, SIZE, STEPS, EVERY = 64, 24, 16, 120, 5
WARMUP = 60


def train(steps: int = STEPS, **changed: Any) -> list[str]:
    """Train on images of 24 kinds; return the verdict at each log line."""
    swav = {"prototypes": 64, "epsilon": 0.05, "iterations": 3, "queue_length": 0}
    config = parse_config(
        {
            "model": {
                "trunk": "resnet8",
                "width": 0.125,
                "stem": "strided",
                "head_hidden": 64,
                "embedding": 32,
            },
            "crops": {"sizes": [SIZE], "counts": [2], "scales": [[0.5, 1.0]]},
            "swav": swav | {key: value for key, value in changed.items() if key != "rate"},
            "optimizer": {"name": "sgd", "rate": changed.get("rate", 0.2), "weight_decay": 1e-4},
            "training": {"batch": BATCH, "precision": "float32"},
        }
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = build_learner(config, Ranks())
    task = Pretraining(
        learner,
        Augment(config.crops),
        Calendar(freeze_until=10, queue_from=math.inf),
        prototypes=64,
        ranks=Ranks(),
    )
    kinds = torch.randn(KINDS, 3, SIZE, SIZE, generator=generator)
    judge = Judge(settings_of(config), Thresholds(hold_steps=10), warmup_images=WARMUP * BATCH)
    losses: list[Tensor] = []
    names = []
    for step in range(1, steps + 1):
        shown = kinds[torch.randint(KINDS, (BATCH,), generator=generator)].repeat(2, 1, 1, 1)
        crops = shown + 0.7 * torch.randn(shown.shape, generator=generator)
        rate = config.optimizer.rate or 0.0
        result = task.step([crops], Stride(rate=rate, images=step * BATCH, done=step))
        task.watch()
        losses.append(result.loss)
        if step % EVERY == 0:
            loss = float(torch.stack(losses).mean())
            names.append(judge.hear(Moment(step, step * BATCH, loss, task.readings())).name)
            losses.clear()
    torch.set_num_threads(threads)
    return names


def test_a_run_that_learns_is_healthy() -> None:
    assert set(train()) == {"warming_up", "healthy"}


@pytest.mark.parametrize(("name", "changed"), [("stuck", {"epsilon": 5.0}), ("diverging", {"rate": 100.0})])
def test_a_run_that_fails_is_found_out(name: str, changed: dict[str, float]) -> None:
    names = train(**changed)
    bad = [each for each in names if each not in ("warming_up", "healthy")]
    assert bad
    assert bad[0] == name
