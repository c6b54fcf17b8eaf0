from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from golden_runs import tiny_network
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from streamswav.config import OptimizerSection
from streamswav.errors import CheckpointError
from streamswav.swav import FeatureQueue, SwAVLoss
from streamswav.training.optim import LARS, build_optimizer
from streamswav.training.swav_learner import SwAVLearner

BATCH = 8
STEP: dict[str, Any] = {"rate": 0.5, "freeze_prototypes": False, "use_queue": True}


def learner(*, length: int = 16, **changes: Any) -> SwAVLearner:
    torch.manual_seed(0)
    network = tiny_network()
    optimizer = changes.pop("optimizer", None) or LARS(network.parameters(), 0.0, weight_decay=1e-4)
    queue = FeatureQueue(length=length, dim=12, crops=2) if length else None
    return SwAVLearner(network, SwAVLoss(), optimizer, crops=5, queue=queue, **changes)


def crops(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 16), (3, 8))
    return [torch.randn(count * BATCH, 3, size, size, generator=generator) for count, size in sizes]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_a_step_reads_nothing_from_the_device(precision: torch.dtype | None) -> None:
    with FakeTensorMode():
        scaler = torch.amp.GradScaler("cpu") if precision is torch.float16 else None
        student = learner(scaler=scaler, autocast=precision)
        for seed in range(4):
            result = student.step(crops(seed), **STEP)
        assert student.queue is not None
        assert student.queue.full
        with pytest.raises(DataDependentOutputException):
            result.loss.item()


def test_results_are_detached_and_apart_by_crop() -> None:
    result = learner().step(crops(0), **STEP)
    assert (result.embeddings.shape, result.scores.shape) == ((5, BATCH, 12), (5, BATCH, 20))
    parts = (result.loss, result.grad_norm, result.embeddings, result.scores)
    assert not any(part.requires_grad for part in parts)


def test_the_loss_falls_on_a_batch_that_is_seen_again_and_again() -> None:
    student = learner(length=0)
    losses = [float(student.step(crops(0), **STEP).loss) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


def test_prototypes_have_unit_length_in_the_forward_pass() -> None:
    student = learner()
    result = student.step(crops(0), **STEP | {"freeze_prototypes": True})
    weight = student.module.prototypes.weight.detach()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(result.scores, result.embeddings @ weight.T)


def test_frozen_prototypes_take_no_momentum_and_may_be_thawed() -> None:
    student = learner()
    weight = student.module.prototypes.weight
    student.step(crops(0), **STEP | {"freeze_prototypes": True})
    frozen = weight.detach().clone()
    assert weight not in student.optimizer.state
    assert weight.requires_grad
    student.step(crops(1), **STEP)
    assert not torch.equal(weight.detach(), frozen)


def test_prototypes_that_are_not_learnt_stay() -> None:
    student = learner(learn_prototypes=False)
    student.module.prototypes.normalise_()
    before = student.module.prototypes.weight.detach().clone()
    for seed in range(3):
        student.step(crops(seed), **STEP)
    torch.testing.assert_close(student.module.prototypes.weight.detach(), before)


def test_the_queue_is_filled_only_when_it_is_to_be_used() -> None:
    student = learner()
    assert student.queue is not None
    student.step(crops(0), **STEP | {"use_queue": False})
    assert not student.queue.features.any()
    result = student.step(crops(1), **STEP)
    assert torch.equal(student.queue.features[:, :BATCH], result.embeddings[:2])


def test_the_queue_counts_from_the_step_after_it_is_full() -> None:
    with_queue, without = learner(), learner(length=0)
    same = [
        torch.equal(with_queue.step(crops(seed), **STEP).loss, without.step(crops(seed), **STEP).loss)
        for seed in range(3)
    ]
    assert same == [True, True, False]


def test_the_gradient_norm_is_that_of_all_gradients() -> None:
    student = learner()
    result = student.step(crops(0), **STEP)
    squares = [p.grad.square().sum() for p in student.module.parameters() if p.grad is not None]
    torch.testing.assert_close(result.grad_norm, torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("length", [0, 16])
def test_five_steps_and_a_checkpoint_and_five_are_ten_steps(length: int) -> None:
    straight, first, second = (learner(length=length) for _ in range(3))
    expected = [straight.step(crops(seed), **STEP).loss.item() for seed in range(10)]
    losses = [first.step(crops(seed), **STEP).loss.item() for seed in range(5)]
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    losses += [second.step(crops(seed), **STEP).loss.item() for seed in range(5, 10)]
    assert losses == expected


def test_a_checkpoint_of_another_network_is_refused() -> None:
    state = learner().state_dict()
    state["network"]["prototypes.weight"] = torch.zeros(21, 12)
    with pytest.raises(CheckpointError, match="prototypes"):
        learner().load_state_dict(state)


def test_a_checkpoint_without_the_queue_is_refused() -> None:
    with pytest.raises(CheckpointError, match="queue_length"):
        learner().load_state_dict(learner(length=0).state_dict())


def test_a_checkpoint_of_another_queue_is_refused() -> None:
    with pytest.raises(CheckpointError):
        learner(length=32).load_state_dict(learner().state_dict())


def test_the_rehearsal_leaves_no_trace() -> None:
    student = learner()
    student.step(crops(0), **STEP)
    before = saved_and_loaded(student.state_dict())
    student.rehearse(crops(7))
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in student.module.parameters())


def test_bfloat16_stays_near_float32() -> None:
    exact, cast = learner(), learner(autocast=torch.bfloat16)
    for seed in range(3):
        expected, result = exact.step(crops(seed), **STEP), cast.step(crops(seed), **STEP)
        assert result.loss.dtype == torch.float32
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
        assert result.loss.item() != expected.loss.item()


def test_loss_scaling_changes_nothing_and_an_overflow_skips_the_step() -> None:
    scaled = learner(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain = learner()
    for seed in range(3):
        expected, result = plain.step(crops(seed), **STEP), scaled.step(crops(seed), **STEP)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-4)
    before = {name: tensor.clone() for name, tensor in scaled.module.named_parameters()}
    overflow = [images * float("inf") for images in crops(3)]
    assert not scaled.step(overflow, **STEP).grad_norm.isfinite()
    for name, tensor in scaled.module.named_parameters():
        if name != "prototypes.weight":
            assert torch.equal(tensor, before[name])
    assert scaled.state_dict()["scaler"]["scale"] == 512


def with_optimizer(name: str) -> SwAVLearner:
    student = learner()
    section = OptimizerSection.model_validate({"name": name, "weight_decay": 1e-4})
    student.optimizer = build_optimizer(section, student.module.parameters())
    return student


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(name: str, broken: float, first: bool) -> None:
    student = with_optimizer(name)
    if not first:
        student.step(crops(0), **STEP)
        student.step(crops(1), **STEP)
    before = saved_and_loaded(student.state_dict())
    pixels = crops(2)
    pixels[1][3, 0, 0, 0] = broken
    result = student.step(pixels, **STEP)
    assert result.skipped
    after = student.state_dict()
    for key in before["network"]:
        assert torch.equal(after["network"][key], before["network"][key]), key
    torch.testing.assert_close(after["queue"], before["queue"], rtol=0, atol=0)
    for index, state in before["optimizer"]["state"].items():
        torch.testing.assert_close(after["optimizer"]["state"][index], state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_after_a_skipped_step_training_goes_on_as_if_it_had_never_been(name: str) -> None:
    straight, stumbling = with_optimizer(name), with_optimizer(name)
    for seed in range(4):
        expected = straight.step(crops(seed), **STEP)
        result = stumbling.step(crops(seed), **STEP)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        skipped = stumbling.step([images * float("nan") for images in crops(9)], **STEP)
        assert skipped.skipped
        stumbling.take_back(skipped.pushed)


def test_a_loss_that_is_not_finite_is_skipped_although_its_gradient_were() -> None:
    class Infinite(SwAVLoss):
        def loss(self, *inputs: Any) -> Any:
            return super().loss(*inputs) + float("inf")

    student = learner()
    student.objective = Infinite()
    assert student.step(crops(0), **STEP).skipped


def test_the_queue_is_full_only_once_steps_that_counted_have_filled_it() -> None:
    student = learner()
    assert student.queue is not None
    student.take_back(student.step([images * float("nan") for images in crops(0)], **STEP).pushed)
    student.step(crops(1), **STEP)
    assert not student.queue.full
    student.step(crops(2), **STEP)
    assert student.queue.full
    assert student.queue.features[0].any(dim=1).all()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_other_optimizers_take_the_same_steps(name: str) -> None:
    torch.manual_seed(0)
    section = OptimizerSection.model_validate({"name": name})
    network = tiny_network()
    student = SwAVLearner(network, SwAVLoss(), build_optimizer(section, network.parameters()), crops=5)
    losses = [
        float(student.step(crops(0), rate=0.02, freeze_prototypes=i < 5, use_queue=False).loss)
        for i in range(40)
    ]
    assert losses[-1] < 0.9 * losses[0]
