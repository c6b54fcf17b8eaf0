"""Linear SVMs against scikit-learn used plainly."""

import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from streamswav.errors import EXIT_CONFIG, ConfigError
from streamswav.transfer.measuring import svm
from streamswav.transfer.measuring.svm import SvmSettings, check_svm, measure_svm

CLASSES = 4


@pytest.fixture
def sets():
    """Classes that overlap: train, labels, test, labels."""
    generator = torch.Generator().manual_seed(8)
    centres = torch.randn(CLASSES, 10, generator=generator)
    labels = torch.randint(0, CLASSES, (360,), generator=generator)
    features = centres[labels] + 1.2 * torch.randn(360, 10, generator=generator)
    return features[:240], labels[:240], features[240:], labels[240:]


def several(labels):
    hot = torch.nn.functional.one_hot(labels, CLASSES)
    return hot | hot.roll(1, dims=1) * (labels[:, None] % 2)


def multi(sets):
    train, train_labels, test, test_labels = sets
    return train, several(train_labels), test, several(test_labels)


def measure(sets, **settings):
    return measure_svm(*sets, classes=CLASSES, settings=SvmSettings(**settings), threads=2)


def plain_scores(sets, cost, column, weight=2.0):
    train, labels, test, _ = (each.double().numpy() for each in sets)
    train, test = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (train, test))
    fitted = LinearSVC(C=cost, class_weight={1: weight, -1: 1}, max_iter=100_000, tol=1e-8)
    return fitted.fit(train, np.where(labels[:, column] > 0, 1, -1)).decision_function(test)


def test_average_precision_of_several_labels_is_that_of_plain_liblinear(sets):
    sets = multi(sets)
    found = measure(sets, costs=(0.5,))
    expected = [
        average_precision_score(sets[3][:, each].numpy(), plain_scores(sets, 0.5, each))
        for each in range(CLASSES)
    ]
    assert found.precision.mean == pytest.approx(np.mean(expected), abs=2e-3)
    assert found.accuracy is None
    assert found.costs == (0.5,) * CLASSES
    assert list(found.scores) == ["mAP", "mAP_11"]
    assert found.unconverged == 0


def test_a_class_takes_the_cost_that_cross_validation_finds_best(sets):
    sets = multi(sets)
    costs = (1e-4, 0.1, 100.0)
    found = measure(sets, costs=costs)
    train = torch.nn.functional.normalize(sets[0].double()).numpy()
    for column, chosen in enumerate(found.costs):
        labels = sets[1][:, column].numpy()
        means = {}
        for cost in costs:
            scores = [
                average_precision_score(
                    labels[held],
                    LinearSVC(C=cost, class_weight={1: 2, 0: 1}, dual=False)
                    .fit(train[kept], labels[kept])
                    .decision_function(train[held]),
                )
                for kept, held in StratifiedKFold(3, shuffle=True, random_state=0).split(train, labels)
            ]
            means[cost] = np.mean(scores)
        assert means[chosen] > max(means.values()) - 0.02
    assert measure(sets, costs=costs) == found


def test_images_of_one_class_get_accuracy_and_precision(sets):
    found = measure(sets, costs=(1.0,))
    train, labels, test, wanted = sets
    unit = [torch.nn.functional.normalize(each.double()).numpy() for each in (train, test)]
    plain = LinearSVC(C=1.0, dual=False).fit(unit[0], labels.numpy())
    assert found.accuracy.top1 == pytest.approx((plain.predict(unit[1]) == wanted.numpy()).mean())
    expected = average_precision_score(
        torch.nn.functional.one_hot(wanted, CLASSES).numpy(),
        plain.decision_function(unit[1]),
        average="macro",
    )
    assert found.precision.mean == pytest.approx(expected)
    assert list(found.scores) == list(found.intervals) == ["top1", "top5", "mAP", "mAP_11"]
    assert 0.4 < found.accuracy.top1 < 0.95


def test_one_cost_is_chosen_for_all_classes_of_single_labels(sets):
    assert measure(sets, costs=(1e-6, 1.0)).costs == (1.0,)


def test_two_classes_are_told_apart_both_ways(sets):
    train, labels, test, wanted = sets
    pair = (train, labels % 2, test, wanted % 2)
    found = measure_svm(*pair, classes=2, settings=SvmSettings((1.0,)))
    assert found.accuracy.top1 > 0.5
    assert found.precision.classes == 2


def test_difficult_objects_are_negatives_in_training_and_not_counted_in_the_test(sets):
    train, labels, test, wanted = multi(sets)
    difficult = labels.clone()
    difficult[::5, 0] = -1
    negatives = labels.clone()
    negatives[::5, 0] = 0
    asked = wanted.clone()
    asked[::3, 0] = -1
    found = measure((train, difficult, test, asked), costs=(0.5,))
    scores = plain_scores((train, negatives, test, wanted), 0.5, 0)
    counted = asked[:, 0].numpy() >= 0
    others = [
        average_precision_score(
            wanted[:, each].numpy(), plain_scores((train, labels, test, wanted), 0.5, each)
        )
        for each in range(1, CLASSES)
    ]
    first = average_precision_score(wanted[:, 0].numpy()[counted], scores[counted])
    assert found.precision.mean == pytest.approx(np.mean([first, *others]), abs=2e-3)


def test_a_class_that_training_lacks_scores_nothing_and_is_told(sets):
    train, labels, test, wanted = multi(sets)
    labels[:, 2] = 0
    found = measure((train, labels, test, wanted), costs=(0.5,))
    assert found.unlearnt == 1
    assert found.costs[2] == 0.0


def test_a_class_of_one_image_is_learnt_without_folds_that_lack_it(sets):
    train, labels, test, wanted = multi(sets)
    labels[:, 1] = 0
    labels[7, 1] = 1
    found = measure((train, labels, test, wanted), costs=(0.1, 1.0, 10.0))
    assert found.costs[1] in (0.1, 1.0, 10.0)
    assert found.unlearnt == 0


def test_folds_are_equal_shares_of_every_class():
    labels = np.repeat([0, 1, 2], [90, 6, 3])
    folds = list(svm._folds(labels, SvmSettings()))
    assert np.array_equal(np.sum(folds, axis=0), np.ones(99))
    assert [np.bincount(labels[held]).tolist() for held in folds] == [[30, 2, 1]] * 3


def test_too_few_images_are_refused(sets):
    few = (sets[0][:2], sets[1][:2], *sets[2:])
    with pytest.raises(ConfigError, match="only 2 training images for 3 folds"):
        measure(few)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'streamswav\\[evaluate\\]'") as caught:
        check_svm()
    assert caught.value.exit_code == EXIT_CONFIG


def test_an_error_while_fits_run_ends_them(sets):
    def alive():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_svm(*sets, classes=CLASSES, settings=SvmSettings(), alive=alive)
