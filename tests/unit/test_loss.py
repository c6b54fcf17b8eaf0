from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from streamswav.swav import FeatureQueue, SwAVLoss, sinkhorn, swapped_prediction_loss


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch(crops: int = 5, size: int = 8, dim: int = 12, prototypes: int = 20) -> tuple[Tensor, Tensor]:
    """Return scores [N, B, K] and prototypes [K, D]."""
    weight = unit(prototypes, dim, seed=1)
    return unit(crops, size, dim) @ weight.T, weight


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("assigned", [(0, 1), (0,), (2, 0, 4)])
def test_every_pair_of_an_assigned_and_another_crop_counts_alike(
    assigned: tuple[int, ...], size: int
) -> None:
    scores, _ = batch(size=size)
    codes = torch.softmax(unit(len(assigned), size, 20, seed=2), dim=-1)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    pairs = [
        -(codes[i] * torch.log_softmax(theirs[other] / 0.1, dim=-1)).sum(dim=-1).mean()
        for i, crop in enumerate(assigned)
        for other in range(5)
        if other != crop
    ]
    loss, expected = (
        swapped_prediction_loss(ours, codes, assigned=assigned, temperature=0.1),
        torch.stack(pairs).mean(),
    )
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_a_second_backward_pass_is_refused_rather_than_wrong() -> None:
    scores, weight = batch()
    loss = SwAVLoss()(scores.requires_grad_(), weight).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_two_crops_give_the_papers_pseudo_code() -> None:
    scores, _ = batch(crops=2)
    q_t, q_s = codes = sinkhorn(scores)
    p_t, p_s = torch.softmax(scores / 0.1, dim=-1)
    expected = -0.5 * (q_t * p_s.log() + q_s * p_t.log()).sum(dim=-1).mean()
    loss = swapped_prediction_loss(scores, codes, assigned=(0, 1), temperature=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_collapsed_network_has_a_loss_of_ln_k() -> None:
    scores = torch.full((4, 8, 3000), 0.3)
    loss = SwAVLoss()(scores, unit(3000, 12)).loss
    assert loss.item() == pytest.approx(math.log(3000), rel=1e-5)


def test_gradient_reaches_the_scores_of_all_crops_but_not_through_the_codes() -> None:
    scores, weight = batch()
    scores.requires_grad_()
    result = SwAVLoss()(scores, weight)
    result.loss.backward()
    assert not result.codes.requires_grad
    analytic = (torch.softmax(scores[2] / 0.1, dim=-1) - result.codes.mean(dim=0)) / (0.1 * 4 * 8)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[2], analytic.detach())


def test_half_precision_scores_give_a_float32_loss() -> None:
    scores, weight = batch()
    exact = SwAVLoss()(scores.bfloat16().float(), weight).loss
    loss = SwAVLoss()(scores.bfloat16(), weight).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)


def test_hard_codes_name_the_best_prototype_alone() -> None:
    scores, weight = batch()
    soft, hard = SwAVLoss()(scores, weight).codes, SwAVLoss(hard_codes=True)(scores, weight).codes
    assert torch.equal(hard.argmax(dim=-1), soft.argmax(dim=-1))
    assert torch.equal(hard.sum(dim=-1), torch.ones(2, 8))
    assert hard.dtype == soft.dtype
    assert hard.max() == 1


def test_codes_belong_to_the_assigned_crops() -> None:
    scores, weight = batch()
    codes = SwAVLoss(assigned=(3, 1))(scores, weight).codes
    torch.testing.assert_close(codes, sinkhorn(scores[[3, 1]]))


def test_the_queue_takes_part_in_the_assignment_with_the_prototypes_of_today() -> None:
    scores, weight = batch()
    queue = FeatureQueue(length=16, dim=12, crops=2)
    past = unit(2, 16, 12, seed=3)
    queue.push(past)
    codes = SwAVLoss()(scores, weight, queue).codes
    together = sinkhorn(torch.cat([past @ weight.T, scores[:2]], dim=1))
    torch.testing.assert_close(codes, together[:, 16:])
    assert (codes - SwAVLoss()(scores, weight).codes).abs().max() > 1e-3


@pytest.mark.parametrize("assigned", [(), (0, 0), (-1,), (5,)])
def test_crops_that_are_not_there_cannot_be_assigned(assigned: tuple[int, ...]) -> None:
    scores, _ = batch()
    codes = torch.softmax(unit(len(assigned), 8, 20, seed=2), dim=-1)
    with pytest.raises(ValueError, match="assigned must name some of the 5 crops"):
        swapped_prediction_loss(scores, codes, assigned=assigned, temperature=0.1)


def test_autocast_changes_no_code() -> None:
    scores, weight = batch()
    queue = FeatureQueue(length=16, dim=12, crops=2)
    queue.push(unit(2, 16, 12, seed=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SwAVLoss()(scores, weight, queue).codes
    assert torch.equal(inside, SwAVLoss()(scores, weight, queue).codes)
