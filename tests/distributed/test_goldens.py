"""The goldens of several ranks, and what else the ranks have to agree on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden_runs import GoldenRun, sinkhorn_golden
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distributed.ranks import run_ranks
from streamswav.swav import sinkhorn

HALF = 5  # steps before and after the interruption


def golden_codes(golden: Mapping[str, Any], rank: int, group: dist.ProcessGroup) -> Tensor:
    return sinkhorn(
        torch.tensor(golden[f"rank{rank}/scores"]),
        epsilon=float(golden["epsilon"]),
        iterations=int(golden["iterations"]),
        group=group,
    )


def collectives(group: dist.ProcessGroup, scores: Tensor, iterations: int) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sinkhorn(scores, iterations=iterations, group=group)
    return [event.name for event in profiler.events() if event.name.startswith("gloo:")]


def on_two_ranks(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    golden = sinkhorn_golden("sinkhorn_2rank")
    everything = torch.cat([torch.tensor(golden[f"rank{r}/scores"]) for r in range(2)])
    both_crops = torch.stack([everything, everything.flip(0)])
    run = GoldenRun("train_2rank_queue")
    learners = {view: run.learner(group, gradient_as_bucket_view=view) for view in (False, True)}
    return {
        "codes": golden_codes(golden, rank, group),
        "uneven": sinkhorn(everything[:5] if rank == 0 else everything[5:], group=group),
        "both crops": sinkhorn(both_crops[:, rank::2], group=group),
        "alone": sinkhorn(everything[rank::2]),
        "collectives": {n: collectives(group, both_crops, n) for n in (0, 3, 10)},
        "losses": {view: list(run.train(learner, rank)) for view, learner in learners.items()},
        "state": {view: learner.state_dict() for view, learner in learners.items()},
    }


def on_four_ranks(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Train in one go and with an interruption, each with and without the rehearsal."""
    run = GoldenRun("train_2rank_queue")
    run.arrays["cfg/epoch_queue_starts"] = 0  # full, and in use, before the interruption
    for r, crop in itertools.product((2, 3), range(5)):
        run.arrays[f"rank{r}/crop{crop}"] = run.arrays[f"rank{r % 2}/crop{crop}"][::-1]

    def train(interrupted: bool, rehearsed: bool) -> dict[str, Any]:
        learner = run.learner(group)
        if rehearsed:
            learner.rehearse(run.crops(rank, 0))
        losses = list(run.train(learner, rank, range(HALF)))
        if interrupted:
            state, learner = learner.state_dict(), run.learner(group)
            learner.load_state_dict(state)
            if rehearsed:
                learner.rehearse(run.crops(rank, 0))
        losses += run.train(learner, rank, range(HALF, 2 * HALF))
        return {"losses": losses, **learner.state_dict()}

    return {
        "codes": golden_codes(sinkhorn_golden("sinkhorn_4rank_10it"), rank, group),
        "straight": train(interrupted=False, rehearsed=True),
        "resumed": train(interrupted=True, rehearsed=True),
        "straight, unrehearsed": train(interrupted=False, rehearsed=False),
        "resumed, unrehearsed": train(interrupted=True, rehearsed=False),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_four_ranks, 4, tmp_path_factory.mktemp("four"))


def test_two_ranks_reproduce_the_recorded_codes(two_ranks: list[dict[str, Any]]) -> None:
    golden = sinkhorn_golden("sinkhorn_2rank")
    for rank, result in enumerate(two_ranks):
        recorded = torch.tensor(golden[f"rank{rank}/codes"])
        torch.testing.assert_close(result["codes"], recorded, rtol=0, atol=1e-6)


def test_four_ranks_reproduce_the_recorded_codes(four_ranks: list[dict[str, Any]]) -> None:
    golden = sinkhorn_golden("sinkhorn_4rank_10it")
    for rank, result in enumerate(four_ranks):
        recorded = torch.tensor(golden[f"rank{rank}/codes"])
        torch.testing.assert_close(result["codes"], recorded, rtol=0, atol=1e-6)


def test_ranks_may_bring_unequal_numbers_of_samples(two_ranks: list[dict[str, Any]]) -> None:
    whole = sinkhorn(_everything())
    uneven = torch.cat([result["uneven"] for result in two_ranks])
    torch.testing.assert_close(uneven, whole, rtol=0, atol=5e-7)


def test_assigned_crops_share_one_call(two_ranks: list[dict[str, Any]]) -> None:
    everything = _everything()
    for rank, result in enumerate(two_ranks):
        for crop, scores in enumerate((everything, everything.flip(0))):
            torch.testing.assert_close(
                result["both crops"][crop], sinkhorn(scores)[rank::2], rtol=0, atol=5e-7
            )


def test_without_a_group_a_rank_is_alone(two_ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(two_ranks):
        assert torch.equal(result["alone"], sinkhorn(_everything()[rank::2]))


@pytest.mark.parametrize(("iterations", "expected"), [(0, 0), (3, 4), (10, 11)])
def test_codes_of_both_crops_cost_one_collective_an_iteration_and_one(
    two_ranks: list[dict[str, Any]], iterations: int, expected: int
) -> None:
    for result in two_ranks:
        assert result["collectives"][iterations] == ["gloo:all_reduce"] * expected


@pytest.mark.parametrize("bucket_view", [False, True])
def test_two_ranks_reproduce_the_recorded_training(
    two_ranks: list[dict[str, Any]], bucket_view: bool
) -> None:
    run = GoldenRun("train_2rank_queue")
    for rank, result in enumerate(two_ranks):
        run.check_losses(result["losses"][bucket_view], rank)
    learner = run.learner()
    learner.load_state_dict(two_ranks[0]["state"][bucket_view])
    run.check_state(learner, 0)
    recorded = torch.tensor(run.arrays["rank1/queue"])
    assert (two_ranks[1]["state"][bucket_view]["queue"]["features"] - recorded).abs().max() < 1e-4


def test_a_resumed_run_is_bit_identical_on_four_ranks(four_ranks: list[dict[str, Any]]) -> None:
    for result in four_ranks:
        assert _bits(result["resumed"]) == _bits(result["straight"])


def test_without_the_rehearsal_a_resumed_run_sums_in_another_order(four_ranks: list[dict[str, Any]]) -> None:
    result = four_ranks[0]
    assert _bits(result["resumed, unrehearsed"]) != _bits(result["straight, unrehearsed"])


def _everything() -> Tensor:
    golden = sinkhorn_golden("sinkhorn_2rank")
    return torch.cat([torch.tensor(golden[f"rank{rank}/scores"]) for rank in range(2)])


def _bits(tree: Any) -> Any:
    """Turn tensors into their bytes, so that == compares every bit."""
    if isinstance(tree, Tensor):
        return tree.numpy().tobytes()
    if isinstance(tree, dict):
        return {key: _bits(value) for key, value in tree.items()}
    return [_bits(value) for value in tree] if isinstance(tree, list) else tree
