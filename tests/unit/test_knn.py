"""Nearest neighbours against a brute-force reference in numpy."""

import numpy as np
import pytest
import torch

from streamswav.errors import ConfigError
from streamswav.transfer import knn
from streamswav.transfer.knn import KnnSettings, count_votes, find_neighbours, measure_knn, weigh

CLASSES = 7


@pytest.fixture
def sets():
    """Clusters that overlap, so that neither all nor none are hit: train, labels, test, labels."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(CLASSES, 12, generator=generator)
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    features = (centres[labels] + 1.5 * torch.randn(400, 12, generator=generator)) * 5
    return features[:300], labels[:300], features[300:], labels[300:]


def brute_force(train, train_labels, test, test_labels, k, temperature):
    """Top-1 and top-5 by sorting all similarities in float64, one query at a time."""
    train, test = train.double().numpy(), test.double().numpy()
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    first, five = [], []
    for query, label in zip(test, test_labels.tolist(), strict=True):
        similarity = train @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[:k]
        votes = np.zeros(CLASSES)
        for index in nearest:
            votes[train_labels[index]] += np.exp(similarity[index] / temperature)
        ranked = [each for each in np.argsort(-votes) if votes[each] > 0]
        first.append(ranked[0] == label)
        five.append(label in ranked[:5])
    return np.mean(first), np.mean(five)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_accuracies_are_those_of_brute_force(sets, temperature):
    settings = KnnSettings((1, 5, 20, 200), temperature)
    found = measure_knn(*sets, classes=CLASSES, settings=settings)
    for k, accuracy in found.items():
        assert (accuracy.top1, accuracy.top5) == pytest.approx(brute_force(*sets, k, temperature))
    assert 0.2 < found[20].top1 < found[20].top5 < 1


def test_several_k_at_once_are_the_same_as_each_alone(sets):
    together = measure_knn(*sets, classes=CLASSES, settings=KnnSettings((3, 50)))
    alone = measure_knn(*sets, classes=CLASSES, settings=KnnSettings((3,)))
    assert together[3] == alone[3]
    assert together[3] != together[50]


def test_small_chunks_change_nothing(sets, monkeypatch):
    whole = measure_knn(*sets, classes=CLASSES, settings=KnnSettings((20, 200)))
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(knn, "_BANK_AT_ONCE", 11)
    assert measure_knn(*sets, classes=CLASSES, settings=KnnSettings((20, 200))) == whole


@pytest.mark.parametrize("part", [1, 4, 64, 300])
def test_neighbours_of_a_bank_in_parts_are_those_of_the_whole(sets, part):
    bank, queries = sets[0], sets[2]
    expected = (queries @ bank.T).topk(30, dim=1)
    similarities, indices = find_neighbours(queries, bank.split(part), 30)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(similarities, expected.values)


def test_tiny_temperatures_do_not_overflow():
    weights = weigh(torch.tensor([[0.9, 0.8, -1.0]]), 0.001)
    assert weights.tolist() == [[1.0, pytest.approx(0.0, abs=1e-30), 0.0]]
    assert torch.isfinite(weights).all()


def test_lengths_of_features_do_not_matter(sets):
    train, train_labels, test, test_labels = sets
    scales = torch.linspace(0.01, 100, len(train))[:, None]
    plain = measure_knn(*sets, classes=CLASSES, settings=KnnSettings((20,)))
    scaled = measure_knn(
        train * scales, train_labels, test, test_labels, classes=CLASSES, settings=KnnSettings((20,))
    )
    assert scaled == plain


def test_a_class_without_votes_is_no_guess():
    scores = count_votes(torch.ones(1, 3), torch.tensor([[2, 2, 4]]), 6)
    assert scores.isfinite().tolist() == [[False, False, True, False, True, False]]
    train = torch.eye(6)
    found = measure_knn(
        train, torch.arange(6), train[:1], torch.tensor([3]), classes=6, settings=KnnSettings((1,))
    )
    assert found[1].top5 == 0


def test_a_label_that_no_training_image_has_is_never_hit(sets):
    unknown = torch.full_like(sets[3], -1)
    found = measure_knn(*sets[:3], unknown, classes=CLASSES, settings=KnnSettings((20,)))
    assert found[20].top1 == found[20].top5 == 0


def test_more_neighbours_than_images_are_refused(sets):
    with pytest.raises(ConfigError, match="only 300 training images"):
        measure_knn(*sets, classes=CLASSES, settings=KnnSettings((20, 301)))


@pytest.mark.parametrize(("images", "used"), [(300, (20, 200)), (200, (20, 200)), (199, (20,)), (7, (7,))])
def test_the_usual_neighbours_shrink_to_the_training_images(sets, images, used):
    train, train_labels, test, test_labels = sets
    found = measure_knn(
        train[:images], train_labels[:images], test, test_labels, classes=CLASSES, settings=KnnSettings()
    )
    assert tuple(found) == used
