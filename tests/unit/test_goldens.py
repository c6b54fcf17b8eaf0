"""The goldens of one process: the authors' own numbers, reproduced by the product's classes."""

from __future__ import annotations

import pytest
import torch
from golden_runs import GoldenRun, sinkhorn_golden

from streamswav.swav import sinkhorn


def test_sinkhorn_reproduces_the_recorded_codes() -> None:
    golden = sinkhorn_golden("sinkhorn_1rank")
    codes = sinkhorn(
        torch.tensor(golden["rank0/scores"]),
        epsilon=float(golden["epsilon"]),
        iterations=int(golden["iterations"]),
    )
    torch.testing.assert_close(codes, torch.tensor(golden["rank0/codes"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sinkhorn_2rank", "sinkhorn_4rank_10it"])
def test_the_codes_of_several_ranks_are_those_of_one_rank_with_all_samples(name: str) -> None:
    golden = sinkhorn_golden(name)
    ranks = range(len([key for key in golden if key.endswith("/scores")]))
    scores = torch.cat([torch.tensor(golden[f"rank{rank}/scores"]) for rank in ranks])
    recorded = torch.cat([torch.tensor(golden[f"rank{rank}/codes"]) for rank in ranks])
    codes = sinkhorn(scores, epsilon=float(golden["epsilon"]), iterations=int(golden["iterations"]))
    torch.testing.assert_close(codes, recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["train_1rank_noqueue", "train_1rank_queue"])
def test_training_reproduces_the_recorded_run(name: str) -> None:
    run = GoldenRun(name)
    learner = run.learner()
    run.check_losses(list(run.train(learner, 0)), 0)
    run.check_state(learner, 0)


@pytest.mark.parametrize("name", ["train_1rank_noqueue", "train_1rank_queue", "train_2rank_queue"])
def test_the_schedule_gives_the_recorded_rates(name: str) -> None:
    run = GoldenRun(name)
    rates = [run.schedule().rate(step * run.batch) for step in range(len(run.arrays["lr"]))]
    assert rates == pytest.approx(run.arrays["lr"], rel=1e-12)


def test_the_bars_tell_a_run_without_prototype_freeze_apart() -> None:
    run = GoldenRun("train_1rank_noqueue")
    run.arrays["cfg/freeze_prototypes_niters"] = 0
    learner = run.learner()
    losses = list(run.train(learner, 0))
    with pytest.raises(AssertionError):
        run.check_losses(losses, 0)
    with pytest.raises(AssertionError):
        run.check_state(learner, 0)
