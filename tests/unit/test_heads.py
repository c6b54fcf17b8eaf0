"""Classifiers trained side by side are those that each gives alone."""

import math

import pytest
import torch
from torch.nn import functional as F

from streamswav.transfer.measuring.heads import IGNORED, HeadBank, HeadSettings

SETTINGS = [HeadSettings(0.03, 0.0), HeadSettings(0.3, 1e-3), HeadSettings(1.0, 1e-5)]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(96, 11, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, 5, (96,), generator=generator)


def train(settings, features, targets, *, multi=False, dtype=torch.float64):
    bank = HeadBank(features.shape[1], 5, settings, seed=7, multi=multi).to(dtype)
    optimizer = torch.optim.SGD(bank.parameter_groups(), momentum=0.9)
    for rows in torch.arange(len(features)).repeat(4).split(32):
        optimizer.zero_grad()
        bank.loss(bank(features[rows].to(dtype)), targets[rows]).backward()
        optimizer.step()
    return bank


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("multi", [False, True])
def test_a_bank_of_three_gives_the_weights_of_three_single_ones(data, multi, dtype, bound):
    features, classes = data
    targets = F.one_hot(classes, 5) if multi else classes
    together = train(SETTINGS, features, targets, multi=multi, dtype=dtype)
    for head, settings in zip(together.heads, SETTINGS, strict=True):
        (alone,) = train([settings], features, targets, multi=multi, dtype=dtype).heads
        torch.testing.assert_close(head.weight, alone.weight, atol=bound, rtol=bound)
        torch.testing.assert_close(head.bias, alone.bias, atol=bound, rtol=bound)
    weights = [head.weight for head in together.heads]
    assert not torch.allclose(weights[0], weights[1], atol=0.05)


def test_scores_are_those_of_each_layer(data):
    bank = HeadBank(11, 5, SETTINGS, seed=0).double()
    with torch.no_grad():
        for head in bank.heads:
            head.weight.normal_()
            head.bias.normal_()
    scores = bank(data[0])
    assert scores.shape == (3, 96, 5)
    for found, head in zip(scores, bank.heads, strict=True):
        torch.testing.assert_close(found, head(data[0]))


def test_the_loss_is_the_sum_of_every_heads_mean(data):
    scores = torch.randn(3, 96, 5, generator=torch.Generator().manual_seed(0))
    classes = data[1]
    bank = HeadBank(11, 5, SETTINGS, seed=0)
    expected = sum(F.cross_entropy(each, classes) for each in scores)
    torch.testing.assert_close(bank.loss(scores, classes), expected)
    shares = F.one_hot(classes, 5) * 0.9 + 0.02
    torch.testing.assert_close(bank.loss(scores, shares), bank.loss(scores, classes, label_smoothing=0.1))


def test_an_ignored_class_of_an_image_counts_for_nothing():
    bank = HeadBank(11, 2, SETTINGS[:1], seed=0, multi=True)
    scores = torch.zeros(1, 2, 2, requires_grad=True)
    loss = bank.loss(scores, torch.tensor([[1, IGNORED], [0, 1]]))
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(2) / 2)
    assert scores.grad.tolist() == [[[-0.25, 0.0], [0.25, -0.25]]]


def test_heads_begin_alike_from_the_seed_and_leave_torchs_own_state_alone():
    before = torch.get_rng_state()
    one, two, other = (HeadBank(6, 3, SETTINGS, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    for head in [*one.heads, *two.heads]:
        assert torch.equal(head.weight, one.heads[0].weight)
        assert not head.bias.any()
    assert not torch.equal(other.heads[0].weight, one.heads[0].weight)


def test_every_head_has_a_group_of_its_own():
    bank = HeadBank(6, 3, SETTINGS, seed=0)
    groups = bank.parameter_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (each.rate, each.weight_decay) for each in SETTINGS
    ]
    held = {id(each) for group in groups for each in group["params"]}
    assert held == {id(each) for each in bank.parameters()}
