"""The linear classifier against the optimum of its own objective."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from streamswav.transfer.linear import LinearSettings, measure_linear, train_linear
from streamswav.transfer.results import measure_accuracy

CLASSES = 6
QUICK = LinearSettings(epochs=20)


@pytest.fixture
def sets():
    """Features after a ReLU, classes that overlap: train, labels, test, labels."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, 24, generator=generator)
    labels = torch.randint(0, CLASSES, (3000,), generator=generator)
    features = torch.relu(0.6 * centres[labels] + torch.randn(3000, 24, generator=generator))
    return features[:2000], labels[:2000], features[2000:], labels[2000:]


def optimum(features, labels):
    """The classifier that L-BFGS finds for the same objective, without weight decay."""
    layer = torch.nn.Linear(features.shape[1], CLASSES)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(layer(features), labels)
        loss.backward()
        return loss

    solver.step(closure)
    return layer


def test_accuracy_is_that_of_the_optimum(sets):
    train, train_labels, test, test_labels = sets
    best = optimum(train, train_labels)
    with torch.no_grad():
        expected = measure_accuracy(best(test), test_labels)
    found = measure_linear(*sets, classes=CLASSES, settings=LinearSettings(epochs=100))
    assert found.top1 == pytest.approx(expected.top1, abs=0.015)
    assert found.top5 == pytest.approx(expected.top5, abs=0.015)
    assert 0.5 < found.top1 < 0.95


def test_the_last_epoch_has_come_to_rest_near_the_optimum(sets):
    train, train_labels, *_ = sets
    layer = train_linear(
        train, train_labels, classes=CLASSES, settings=LinearSettings(epochs=100), device="cpu"
    )
    with torch.no_grad():
        found = F.cross_entropy(layer(train), train_labels)
        least = F.cross_entropy(optimum(train, train_labels)(train), train_labels)
    assert least <= found < least + 0.01


def test_the_seed_alone_decides(sets):
    train, labels, *_ = sets

    def weight(settings):
        return train_linear(train, labels, classes=CLASSES, settings=settings, device="cpu").weight

    first = weight(QUICK)
    torch.rand(17)
    assert torch.equal(weight(QUICK), first)
    assert not torch.equal(weight(replace(QUICK, seed=1)), first)


def test_standardised_features_make_shift_and_scale_irrelevant(sets):
    train, train_labels, test, test_labels = sets
    scale = torch.logspace(-3, 3, train.shape[1])
    settings = replace(QUICK, standardise=True)
    plain = measure_linear(*sets, classes=CLASSES, settings=settings)
    moved = measure_linear(
        train * scale + 5, train_labels, test * scale + 5, test_labels, classes=CLASSES, settings=settings
    )
    assert moved.top1 == pytest.approx(plain.top1, abs=0.01)


def test_a_constant_feature_survives_standardising(sets):
    train, train_labels, test, test_labels = sets
    flat = [torch.cat([each, torch.full((len(each), 1), 4.0)], dim=1) for each in (train, test)]
    settings = replace(QUICK, standardise=True)
    found = measure_linear(flat[0], train_labels, flat[1], test_labels, classes=CLASSES, settings=settings)
    assert found.top1 > 0.5


def test_accuracy_counts_the_best_and_the_best_five():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(4, 1)
    accuracy = measure_accuracy(scores, torch.tensor([0, 4, 5, 6]))
    assert (accuracy.top1, accuracy.top5) == (0.25, 0.5)


def test_with_three_classes_the_best_five_are_all():
    accuracy = measure_accuracy(torch.tensor([[3.0, 2, 1], [3, 2, 1]]), torch.tensor([2, 0]))
    assert (accuracy.top1, accuracy.top5) == (0.5, 1.0)
