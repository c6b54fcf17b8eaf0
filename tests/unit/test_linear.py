"""Linear classifiers against the optimum of their objective, and a grid of them against single ones."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from streamswav.errors import ConfigError
from streamswav.transfer.measuring import linear
from streamswav.transfer.measuring.heads import HeadSettings
from streamswav.transfer.measuring.linear import LinearSettings, measure_linear, train_linear
from streamswav.transfer.measuring.results import measure_accuracy

CLASSES = 6
QUICK = LinearSettings(epochs=20)
GRID = replace(QUICK, rates=(0.001, 0.3), weight_decays=(0.0, 0.03))


@pytest.fixture
def sets():
    """Features after a ReLU, classes that overlap: train, labels, test, labels."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, 24, generator=generator)
    labels = torch.randint(0, CLASSES, (3000,), generator=generator)
    features = torch.relu(0.6 * centres[labels] + torch.randn(3000, 24, generator=generator))
    return features[:2000], labels[:2000], features[2000:], labels[2000:]


def accuracy(sets, settings):
    """Of the only head."""
    (found,) = measure_linear(*sets, classes=CLASSES, settings=settings).heads.values()
    return found


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
    found = accuracy(sets, LinearSettings(epochs=100))
    assert found.top1 == pytest.approx(expected.top1, abs=0.015)
    assert found.top5 == pytest.approx(expected.top5, abs=0.015)
    assert 0.5 < found.top1 < 0.95


def test_the_last_epoch_has_come_to_rest_near_the_optimum(sets):
    train, train_labels, *_ = sets
    settings = LinearSettings(epochs=100)
    (layer,) = train_linear(train, train_labels, classes=CLASSES, settings=settings, device="cpu").layers
    with torch.no_grad():
        found = F.cross_entropy(layer(train), train_labels)
        least = F.cross_entropy(optimum(train, train_labels)(train), train_labels)
    assert least <= found < least + 0.01


def test_the_seed_alone_decides(sets):
    train, labels, *_ = sets

    def weight(settings):
        (layer,) = train_linear(train, labels, classes=CLASSES, settings=settings, device="cpu").layers
        return layer.weight

    first = weight(QUICK)
    torch.rand(17)
    assert torch.equal(weight(QUICK), first)
    assert not torch.equal(weight(replace(QUICK, seed=1)), first)


def test_standardised_features_make_shift_and_scale_irrelevant(sets):
    train, train_labels, test, test_labels = sets
    scale = torch.logspace(-3, 3, train.shape[1])
    settings = replace(QUICK, standardise=True)
    plain = accuracy(sets, settings)
    moved = accuracy((train * scale + 5, train_labels, test * scale + 5, test_labels), settings)
    assert moved.top1 == pytest.approx(plain.top1, abs=0.01)


def test_a_constant_feature_survives_standardising(sets):
    train, train_labels, test, test_labels = sets
    flat = [torch.cat([each, torch.full((len(each), 1), 4.0)], dim=1) for each in (train, test)]
    settings = replace(QUICK, standardise=True)
    found = accuracy((flat[0], train_labels, flat[1], test_labels), settings)
    assert found.top1 > 0.5


def test_accuracy_counts_the_best_and_the_best_five():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(4, 1)
    accuracy = measure_accuracy(scores, torch.tensor([0, 4, 5, 6]))
    assert (accuracy.top1, accuracy.top5) == (0.25, 0.5)


def test_with_three_classes_the_best_five_are_all():
    accuracy = measure_accuracy(torch.tensor([[3.0, 2, 1], [3, 2, 1]]), torch.tensor([2, 0]))
    assert (accuracy.top1, accuracy.top5) == (0.5, 1.0)


def test_every_head_of_a_grid_gives_what_it_gives_alone(sets):
    together = measure_linear(*sets, classes=CLASSES, settings=GRID).heads
    assert list(together) == [HeadSettings(rate, decay) for rate in (0.001, 0.3) for decay in (0.0, 0.03)]
    for head, found in together.items():
        alone = accuracy(sets, replace(QUICK, rates=(head.rate,), weight_decays=(head.weight_decay,)))
        assert found.top1 == pytest.approx(alone.top1, abs=0.003)
    assert len({found.top1 for found in together.values()}) > 2


def test_a_head_is_chosen_by_held_out_training_images_alone(sets):
    train, train_labels, test, test_labels = sets
    honest = measure_linear(*sets, classes=CLASSES, settings=GRID)
    misled = measure_linear(
        train, train_labels, test, (test_labels + 1) % CLASSES, classes=CLASSES, settings=GRID
    )
    assert misled.ranking == honest.ranking
    assert misled.chosen == honest.chosen == list(honest.heads)[honest.ranking.index(max(honest.ranking))]
    assert misled.heads[misled.best].top1 == max(found.top1 for found in misled.heads.values())
    assert len(honest.ranking) == 4


def test_heads_are_reported_as_trained_on_all_images_whatever_is_held_out(sets):
    plain = measure_linear(*sets, classes=CLASSES, settings=replace(GRID, validation=0.0))
    held = measure_linear(*sets, classes=CLASSES, settings=replace(GRID, validation=0.5))
    assert plain.heads == held.heads
    assert (plain.chosen, plain.ranking) == (None, ())


def test_a_single_head_holds_nothing_out_unless_asked(sets):
    assert QUICK.held_out == 0.0
    assert GRID.held_out == 0.1
    found = measure_linear(*sets, classes=CLASSES, settings=replace(QUICK, validation=0.25))
    assert found.chosen == HeadSettings(0.3, 1e-6)
    assert found.ranking[0] == pytest.approx(accuracy(sets, QUICK).top1, abs=0.1)


def test_what_is_held_out_is_a_share_from_the_seed():
    for images, share, expected in ((100, 0.1, 10), (5, 0.1, 1), (3, 0.99, 2)):
        kept, held = linear._hold_out(images, replace(GRID, validation=share))
        assert len(held) == expected
        assert sorted([*kept.tolist(), *held.tolist()]) == list(range(images))
    other = linear._hold_out(100, replace(GRID, seed=1))[1]
    assert not torch.equal(other, linear._hold_out(100, GRID)[1])
    with pytest.raises(ConfigError, match=r"--validation = 0\.1: there are only 1 training images"):
        linear._hold_out(1, GRID)


def test_images_of_several_labels_are_learnt_class_by_class(sets):
    train, train_labels, test, test_labels = sets
    wanted, asked = (
        F.one_hot(each, CLASSES) | F.one_hot((each + 1) % CLASSES, CLASSES)
        for each in (train_labels, test_labels)
    )
    found = measure_linear(train, wanted, test, asked, classes=CLASSES, settings=GRID)
    last = list(found.heads.values())[2]
    chance = asked.double().mean().item()
    assert chance == pytest.approx(2 / CLASSES)
    assert last.mean > chance + 0.3
    assert last.intervals["mAP"].low < last.mean < last.intervals["mAP"].high
    assert found.chosen is not None
    assert found.ranking[2] == pytest.approx(last.mean, abs=0.1)


def test_a_head_that_diverges_hits_nothing_and_leaves_the_others_alone(sets):
    settings = replace(QUICK, rates=(1e30, 0.3), validation=0.0)
    wild, tame = measure_linear(*sets, classes=CLASSES, settings=settings).heads.values()
    assert wild.top1 == 0.0
    assert tame.top1 == pytest.approx(accuracy(sets, QUICK).top1, abs=0.003)
