from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from streamswav.config import OptimizerSection
from streamswav.training import LARS
from streamswav.training.optim import build_optimizer


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def give(tensor: nn.Parameter, *values: float) -> None:
    tensor.grad = torch.tensor(values, dtype=tensor.dtype)


def written_out(p: Tensor, g: Tensor, m: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """One step of one tensor, from the formula."""
    if p.norm() > 0 and g.norm() > 0:
        g = (g + decay * p) * (0.001 * p.norm() / (g.norm() + decay * p.norm() + 1e-8))
    m = 0.9 * m + g
    return p - lr * m, m


def test_two_steps_give_the_published_numbers() -> None:
    p = parameter(3.0, 4.0)
    optimizer = LARS([p], 0.3, weight_decay=1e-6)
    for expected in ([2.999100000009, 3.998800000012], [2.997390270026, 3.996520360035]):
        give(p, 0.6, 0.8)
        optimizer.step()
        assert p.tolist() == pytest.approx(expected, abs=1e-12)


def test_all_tensors_of_a_network_move_by_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)).double()
    optimizer = LARS(model.parameters(), 0.5, weight_decay=1e-2)
    states = [(p.detach().clone(), torch.zeros_like(p)) for p in model.parameters()]
    for rate in (0.5, 0.2, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        states = [
            written_out(p, g, m, rate, 1e-2)
            for (p, m), g in zip(states, gradients, strict=True)
            if g is not None
        ]
        optimizer.step()
    for actual, (expected, _) in zip(model.parameters(), states, strict=True):
        torch.testing.assert_close(actual.detach(), expected)


def test_a_tensor_of_zero_norm_steps_plainly() -> None:
    p = parameter(0.0, 0.0)
    give(p, 0.6, 0.8)
    LARS([p], 0.5, weight_decay=0.1).step()
    assert p.tolist() == pytest.approx([-0.3, -0.4])


def test_a_zero_gradient_brings_no_weight_decay_but_momentum_goes_on() -> None:
    p = parameter(3.0, 4.0)
    optimizer = LARS([p], 0.5, weight_decay=0.1)
    give(p, 0.0, 0.0)
    optimizer.step()
    assert p.tolist() == [3.0, 4.0]
    give(p, 0.6, 0.8)
    optimizer.step()
    moved = 3.0 - p[0].item()
    give(p, 0.0, 0.0)
    optimizer.step()
    assert 3.0 - p[0].item() == pytest.approx(1.9 * moved)


def test_a_tensor_without_gradient_stays_and_keeps_its_momentum() -> None:
    p, q = parameter(3.0, 4.0), parameter(1.0)
    optimizer = LARS([p, q], 0.5)
    give(p, 0.6, 0.8)
    optimizer.step()
    before, momentum = p.tolist(), optimizer.state[p]["momentum_buffer"].clone()
    p.grad = None
    give(q, 1.0)
    optimizer.step()
    assert p.tolist() == before
    assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum)
    assert q.item() < 1.0


def test_a_step_without_any_gradient_does_nothing() -> None:
    p = parameter(3.0, 4.0)
    LARS([p], 0.5).step()
    assert p.tolist() == [3.0, 4.0]


def test_gradients_are_left_as_they_were() -> None:
    p = parameter(3.0, 4.0)
    give(p, 0.6, 0.8)
    LARS([p], 0.5, weight_decay=0.1).step()
    assert p.grad is not None
    assert p.grad.tolist() == [0.6, 0.8]


def test_momentum_survives_saving_and_loading() -> None:
    straight, resumed = parameter(3.0, 4.0), parameter(3.0, 4.0)
    first = LARS([straight], 0.5)
    give(straight, 0.6, 0.8)
    first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LARS([resumed], 0.1)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        resumed.copy_(straight)
    for optimizer, p in ((first, straight), (second, resumed)):
        give(p, 0.1, -0.8)
        optimizer.step()
    assert resumed.tolist() == straight.tolist()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaled_loss_gives_the_same_step(unscale: bool) -> None:
    scaled, plain = parameter(3.0, 4.0), parameter(3.0, 4.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = LARS([scaled], 0.5, weight_decay=0.1)
    scaler.scale((scaled * torch.tensor([0.6, 0.8])).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    give(plain, 0.6, 0.8)
    LARS([plain], 0.5, weight_decay=0.1).step()
    assert scaled.tolist() == pytest.approx(plain.tolist(), rel=1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_scaled_step_that_overflows_moves_neither_weights_nor_momentum(bad: float) -> None:
    p, q = parameter(3.0, 4.0), parameter(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = LARS([p, q], 0.5)
    for factor in (1.0, bad):
        before = [p.tolist(), q.tolist(), [s["momentum_buffer"].tolist() for s in optimizer.state.values()]]
        optimizer.zero_grad()
        scaler.scale(p.sum() * factor + q.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    after = [p.tolist(), q.tolist(), [s["momentum_buffer"].tolist() for s in optimizer.state.values()]]
    assert after == before
    assert scaler.get_scale() == 128


@pytest.mark.parametrize(
    ("name", "kind"), [("lars", LARS), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)]
)
def test_the_configuration_names_the_optimizer_and_its_constants(name: str, kind: type) -> None:
    section = OptimizerSection.model_validate(
        {"name": name, "weight_decay": 0.5, "momentum": 0.7, "betas": (0.8, 0.9), "trust": 0.01}
    )
    p = parameter(3.0, 4.0)
    optimizer = build_optimizer(section, [p])
    group = optimizer.param_groups[0]
    expected = {"weight_decay": 0.5, "momentum": 0.7, "betas": (0.8, 0.9), "trust": 0.01}
    assert type(optimizer) is kind
    assert group["weight_decay"] == 0.5
    assert {key: group[key] for key in expected.keys() & group.keys()} == {
        key: expected[key] for key in expected.keys() & group.keys()
    }
    give(p, 1.0, 1.0)
    group["lr"] = 0.1
    optimizer.step()
    assert p[0].item() < 3.0
