"""Average precision against scikit-learn, curves drawn by hand, and a plain reading of VOC07's definition."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from streamswav.transfer.measuring import precision
from streamswav.transfer.measuring.precision import average_precision, measure_precision


def eleven_points(labels, scores):
    """The definition, from scikit-learn's curve without the point that it adds at recall 0."""
    precisions, recalls = (each[:-1] for each in precision_recall_curve(labels, scores)[:2])
    return np.mean([precisions[recalls >= point - 1e-12].max() for point in np.linspace(0, 1, 11)])


@pytest.mark.parametrize("images", [3, 20, 500])
@pytest.mark.parametrize("levels", [3, 10**9])
def test_both_are_those_of_scikit_learn_with_and_without_ties(images, levels):
    random = np.random.default_rng(images)
    for _ in range(10):
        scores = random.integers(0, levels, images) / levels
        labels = random.integers(0, 2, images)
        labels[0] = 1
        found = average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
        assert found[0] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert found[1] == pytest.approx(eleven_points(labels, scores), abs=1e-12)


def test_a_curve_by_hand():
    # Right, wrong, right, wrong: precision 1 at recall 1/2, then 2/3 at recall 1.
    found = average_precision(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 1, 0]))
    assert found == pytest.approx((0.5 * 1 + 0.5 * 2 / 3, (6 * 1 + 5 * 2 / 3) / 11))


def test_equal_scores_are_one_step():
    scores, labels = torch.zeros(4), torch.tensor([0, 0, 1, 0])
    assert average_precision(scores, labels) == pytest.approx((0.25, 0.25))
    assert average_precision(scores.flip(0), labels.flip(0)) == pytest.approx((0.25, 0.25))


def test_images_that_are_not_counted_do_not_exist():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels = torch.tensor([-1, 1, -1, 0])
    assert average_precision(scores, labels) == (1.0, 1.0)


def test_without_a_positive_there_is_no_precision():
    assert all(map(math.isnan, average_precision(torch.rand(5), torch.zeros(5))))


def test_the_mean_is_over_classes_that_have_a_positive():
    random = np.random.default_rng(0)
    scores, labels = random.random((60, 4)), random.integers(0, 2, (60, 4))
    labels[:, 2] = 0
    found = measure_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    expected = [average_precision_score(labels[:, each], scores[:, each]) for each in (0, 1, 3)]
    assert found.mean == pytest.approx(np.mean(expected))
    assert (found.images, found.classes, found.without) == (60, 3, 1)
    assert measure_precision(torch.rand(5, 2), torch.zeros(5, 2)).classes == 0


def test_the_interval_is_that_of_scikit_learns_precision_on_the_same_draws(monkeypatch):
    monkeypatch.setattr(precision, "_RESAMPLES", 200)
    random = np.random.default_rng(5)
    scores, labels = random.random((50, 3)), random.integers(0, 2, (50, 3))
    counts = precision._draw(50, 200, seed=3).numpy()
    means = [
        np.mean(
            [
                average_precision_score(labels[:, each], scores[:, each], sample_weight=row)
                for each in range(3)
            ]
        )
        for row in counts
    ]
    found = measure_precision(torch.from_numpy(scores), torch.from_numpy(labels), seed=3)
    interval = found.intervals["mAP"]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert interval.low < found.mean < interval.high
    assert counts.sum(axis=1).tolist() == [50] * 200


def test_parts_and_seed_decide_as_they_should(monkeypatch):
    scores, labels = torch.rand(40, 2), torch.randint(0, 2, (40, 2))
    whole = measure_precision(scores, labels)
    assert measure_precision(scores, labels, seed=1).intervals != whole.intervals
    monkeypatch.setattr(precision, "_WEIGHTS_AT_ONCE", 100)
    assert measure_precision(scores, labels) == whole
