"""The same global batches on 1, 2, 3 and 4 ranks: the same codes, losses and weights, up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from distributed.ranks import run_ranks
from streamswav.config import Config
from streamswav.swav import sinkhorn
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks
from streamswav.training.swav_learner import SwAVLearner

BATCH, STEPS, CROPS = 12, 6, ((2, 16), (3, 8))
VALUES: Mapping[str, Any] = {
    "crops": {"sizes": [16, 8], "counts": [2, 3], "scales": [[0.3, 1.0], [0.1, 0.3]]},
    "model": {"trunk": "resnet10", "width": 0.125, "stem": "small", "head_hidden": 16, "embedding": 8},
    "swav": {"prototypes": 12, "epsilon": 0.05, "iterations": 3, "queue_length": 24},
    "optimizer": {"rate": 0.05},
    "training": {"batch": BATCH, "precision": "float32", "sync_batch_norm": 0},
}


def crops(step: int, rank: int, world_size: int) -> list[Tensor]:
    """This rank's share of a global batch, crop-major."""
    generator = torch.Generator().manual_seed(step)
    whole = [torch.randn(count, BATCH, 3, size, size, generator=generator) for count, size in CROPS]
    return [each.chunk(world_size, dim=1)[rank].flatten(0, 1) for each in whole]


def train(rank: int, group: dist.ProcessGroup, **training: Any) -> dict[str, Any]:
    world_size = dist.get_world_size(group)
    torch.manual_seed(0)
    config = Config.model_validate({**VALUES, "training": {**VALUES["training"], **training}})
    learner = build_learner(config, Ranks(rank, world_size, group=group))
    losses = [one_step(learner, step, rank, world_size) for step in range(STEPS)]
    assert learner.queue is not None
    return {
        "losses": torch.stack(losses),
        "network": learner.module.state_dict(),
        "queue": learner.queue.features,
    }


def one_step(learner: SwAVLearner, step: int, rank: int, world_size: int) -> Tensor:
    share = crops(step, rank, world_size)
    if step == 3 and rank == 0:
        share[0][0, 0, 0, 0] = torch.nan  # on one rank alone; all of them skip the step
    result = learner.step(share, rate=0.05, freeze_prototypes=step == 0, use_queue=True)
    assert bool(result.skipped) == (step == 3), (step, rank, result)
    return torch.zeros(()) if step == 3 else result.loss


def with_whole_batch_statistics(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    return train(rank, group)


def with_statistics_of_pairs(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    return train(rank, group, sync_batch_norm=2)


def in_pieces(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    return train(rank, group, micro_batches=3, activation_checkpointing=True)


def of_subgroups(rank: int, _: dist.ProcessGroup) -> dict[str, Any]:
    """Two problems at once, each over a group of two of the four ranks, with unequal shares."""
    own, _ = dist.new_subgroups(2)  # type: ignore[no-untyped-call]  # torch
    scores = problem(rank // 2)
    rows = slice(0, 5) if rank % 2 == 0 else slice(5, None)
    empty = slice(0, 0) if rank % 2 == 0 else slice(0, None)
    return {
        "uneven": sinkhorn(scores[rows], group=own),
        "one rank has none": sinkhorn(scores[empty], epsilon=0.001, iterations=10, group=own),
    }


def problem(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    samples = F.normalize(torch.randn(32, 6, generator=generator), dim=1)
    return samples @ F.normalize(torch.randn(10, 6, generator=generator), dim=1).T


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (result,) = run_ranks(with_whole_batch_statistics, 1, tmp_path_factory.mktemp("one"))
    return dict(result)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_losses_and_weights_do_not_depend_on_the_number_of_ranks(
    alone: dict[str, Any], tmp_path: Any, world_size: int
) -> None:
    results = run_ranks(with_whole_batch_statistics, world_size, tmp_path)
    losses = torch.stack([result["losses"] for result in results]).mean(dim=0)
    torch.testing.assert_close(losses, alone["losses"], rtol=1e-5, atol=0)
    for name, expected in alone["network"].items():
        if name != "projection_head.0.bias":  # it feeds a batch norm: its gradient is rounding noise
            _close(results[0]["network"][name], expected, name)
        for other in results[1:]:
            assert torch.equal(other["network"][name], results[0]["network"][name]), name
    by_batch = [result["queue"].unflatten(1, (-1, BATCH // world_size)) for result in results]
    _close(torch.cat(by_batch, dim=2).flatten(1, 2), alone["queue"], "queue")


def test_batch_statistics_may_be_shared_in_groups(alone: dict[str, Any], tmp_path: Any) -> None:
    results = run_ranks(with_statistics_of_pairs, 4, tmp_path)
    mean = "trunk.bn1.running_mean"
    pairs = [result["network"][mean] for result in results]
    assert torch.equal(pairs[0], pairs[1])
    assert torch.equal(pairs[2], pairs[3])
    assert not torch.equal(pairs[0], pairs[2])
    losses = torch.stack([result["losses"] for result in results]).mean(dim=0)
    assert not torch.allclose(losses, alone["losses"], rtol=1e-5)


def test_pieces_and_checkpointed_blocks_work_on_several_ranks(tmp_path: Any) -> None:
    one = run_ranks(in_pieces, 1, tmp_path / "one")
    two = run_ranks(in_pieces, 2, tmp_path / "two")
    assert torch.isfinite(two[0]["losses"]).all()
    assert torch.equal(two[0]["network"]["trunk.conv1.weight"], two[1]["network"]["trunk.conv1.weight"])
    assert one[0]["losses"][0].item() == pytest.approx(two[0]["losses"][0].item(), rel=0.2)


def test_groups_of_ranks_solve_problems_of_their_own(tmp_path: Any) -> None:
    results = run_ranks(of_subgroups, 4, tmp_path)
    for number in range(2):
        first, second = results[2 * number : 2 * number + 2]
        whole = sinkhorn(problem(number))
        torch.testing.assert_close(torch.cat([first["uneven"], second["uneven"]]), whole, rtol=0, atol=5e-7)
        assert first["one rank has none"].shape == (0, 10)
        sharp = sinkhorn(problem(number), epsilon=0.001, iterations=10)
        torch.testing.assert_close(second["one rank has none"], sharp, rtol=0, atol=5e-7)


def _close(actual: Tensor, expected: Tensor, name: str) -> None:
    far = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    assert far < 1e-4, (name, far)
