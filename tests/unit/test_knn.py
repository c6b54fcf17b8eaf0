"""Nearest neighbours against a brute-force reference in numpy."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from streamswav.errors import ConfigError
from streamswav.transfer.measuring import knn, neighbours
from streamswav.transfer.measuring.knn import KnnSettings, Vote, count_votes, measure_knn, weigh
from streamswav.transfer.measuring.neighbours import NOWHERE, Blocks, find_neighbours, merge, top_in_order

CLASSES = 7


@pytest.fixture
def sets():
    """Clusters that overlap, so that neither all nor none are hit: train, labels, test, labels."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(CLASSES, 12, generator=generator)
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    features = (centres[labels] + 1.5 * torch.randn(400, 12, generator=generator)) * 5
    return features[:300], labels[:300], features[300:], labels[300:]


def measure(sets, *neighbours_asked, temperature=0.1, **more):
    settings = KnnSettings(neighbours_asked or None, (temperature,))
    return {
        vote.k: found
        for vote, found in measure_knn(*sets, classes=CLASSES, settings=settings, **more).items()
    }


def nearest_first(train, query):
    """Similarities in float64, best first, and whose they are; of equal ones the first."""
    similarity = train @ (query / np.linalg.norm(query))
    order = np.argsort(-similarity, kind="stable")
    return similarity[order], order


def brute_force(train, train_labels, test, test_labels, k, temperature):
    """Top-1 and top-5 by sorting all similarities in float64, one query at a time."""
    train, test = train.double().numpy(), test.double().numpy()
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    first, five = [], []
    for query, label in zip(test, test_labels.tolist(), strict=True):
        similarity, order = nearest_first(train, query)
        votes = np.zeros(CLASSES)
        for weight, index in zip(np.exp(similarity[:k] / temperature), order[:k], strict=True):
            votes[train_labels[index]] += weight
        ranked = [each for each in np.argsort(-votes) if votes[each] > 0]
        first.append(ranked[0] == label)
        five.append(label in ranked[:5])
    return np.mean(first), np.mean(five)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_accuracies_are_those_of_brute_force(sets, temperature):
    found = measure(sets, 1, 5, 20, 200, temperature=temperature)
    for k, accuracy in found.items():
        assert (accuracy.top1, accuracy.top5) == pytest.approx(brute_force(*sets, k, temperature))
    assert 0.2 < found[20].top1 < found[20].top5 < 1
    assert found[20].images == 100


def test_several_at_once_are_the_same_as_each_alone(sets):
    settings = KnnSettings((3, 50), (0.05, 2.0))
    together = measure_knn(*sets, classes=CLASSES, settings=settings)
    assert list(together) == [Vote(3, 0.05), Vote(3, 2.0), Vote(50, 0.05), Vote(50, 2.0)]
    for vote, found in together.items():
        assert measure(sets, vote.k, temperature=vote.temperature) == {vote.k: found}
    assert together[Vote(50, 0.05)] != together[Vote(50, 2.0)]


def test_small_blocks_change_nothing(sets, monkeypatch):
    whole = measure(sets, 20, 200)
    for name, size in (("_QUERIES_AT_ONCE", 7), ("_TILE", 5), ("_BANK_AT_ONCE", 11)):
        monkeypatch.setattr(neighbours, name, size)
    monkeypatch.setattr(knn, "_ROUND", 13)
    monkeypatch.setattr(knn, "_VOTES_AT_ONCE", 2 * CLASSES)
    assert Blocks.fit(100, 300) == Blocks(7, 5, 15)
    assert measure(sets, 20, 200) == whole


@pytest.mark.parametrize("blocks", [Blocks(8, 8, 8), Blocks(64, 64, 128), Blocks(128, 320, 320)])
def test_neighbours_of_a_bank_in_parts_are_those_of_the_whole(sets, blocks):
    bank, queries = sets[0], sets[2]
    similarities, rows = find_neighbours(queries, bank, 30, blocks=blocks)
    for query, near, found in zip(queries.double().numpy(), similarities, rows, strict=True):
        unit = bank.double().numpy() / np.linalg.norm(bank.double().numpy(), axis=1, keepdims=True)
        expected, order = nearest_first(unit, query)
        assert found.tolist() == order[:30].tolist()
        assert near.numpy() == pytest.approx(expected[:30], abs=1e-6)


@pytest.mark.parametrize("features", [3, 64, 500])
def test_a_pair_has_the_same_similarity_to_the_bit_wherever_it_comes(features):
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(size, features, generator=generator) for size in (900, 50))
    blocks = Blocks.fit(50, 900)
    expected, rows = find_neighbours(queries, bank, 900, blocks=blocks)
    mixed = torch.randperm(900, generator=generator)
    for share in mixed[:1], mixed[1:102], mixed[102:]:
        found, own = find_neighbours(queries[7:8], bank[share], len(share), blocks=blocks)
        by_row = dict(zip(rows[7].tolist(), expected[7].tolist(), strict=True))
        assert found[0].tolist() == [by_row[row] for row in share[own[0]].tolist()]


def test_equal_images_come_in_the_order_of_the_bank(monkeypatch):
    monkeypatch.setattr(neighbours, "_EDGE", 2)
    generator = torch.Generator().manual_seed(1)
    different = torch.randn(4, 6, generator=generator)
    bank = different[torch.arange(60) % 4]
    for blocks in Blocks(8, 8, 8), Blocks(8, 16, 32), Blocks(8, 60, 60):
        _, rows = find_neighbours(different, bank, 20, blocks=blocks)
        assert [row[:15].tolist() for row in rows] == [list(range(own, 60, 4)) for own in range(4)]


def test_the_largest_come_in_order_and_of_equal_ones_the_first():
    values = torch.tensor([[1.0, 3, 3, 2, 3], [5, 5, 5, 5, 5], [1, 2, 3, 4, 5]])
    found, columns = top_in_order(values, 2)
    assert found.tolist() == [[3, 3], [5, 5], [5, 4]]
    assert columns.tolist() == [[1, 2], [0, 1], [4, 3]]
    assert top_in_order(values, 9)[1].tolist() == [[1, 2, 4, 3, 0], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]


def test_what_several_have_found_is_merged_by_value_then_by_place():
    missing = -torch.inf
    near = torch.tensor([[0.9, 0.5, missing, 0.9, 0.9, 0.4]])
    where = torch.tensor([[7, 9, NOWHERE, 2, 8, 1]])
    assert merge(near, where, 4)[1].tolist() == [[2, 7, 8, 9]]


def test_half_precision_of_the_bank_moves_similarities_in_the_fifth_decimal(sets):
    train, train_labels, test, test_labels = sets
    exact, _ = find_neighbours(test, train, 300)
    half, _ = find_neighbours(test, torch.nn.functional.normalize(train).half(), 300)
    assert (half - exact).abs().max() < 5e-4
    found = measure((torch.nn.functional.normalize(train).half(), train_labels, test, test_labels), 20)
    assert found[20].top1 == pytest.approx(measure(sets, 20)[20].top1, abs=0.021)


def test_tiny_temperatures_do_not_overflow():
    weights = weigh(torch.tensor([[0.9, 0.8, -1.0]]), 0.001)
    assert weights.tolist() == [[1.0, pytest.approx(0.0, abs=1e-30), 0.0]]
    assert torch.isfinite(weights).all()


def test_lengths_of_features_do_not_matter(sets):
    train, *others = sets
    scales = torch.linspace(0.01, 100, len(train))[:, None]
    assert measure((train * scales, *others), 20) == measure(sets, 20)


def test_a_class_without_votes_is_no_guess():
    scores = count_votes(torch.ones(1, 3), torch.tensor([[2, 2, 4]]), 6)
    assert scores.isfinite().tolist() == [[False, False, True, False, True, False]]
    train = torch.eye(6)
    found = measure((train, torch.arange(6), train[:1], torch.tensor([3])), 1)
    assert found[1].top5 == 0


def test_a_label_that_no_training_image_has_is_never_hit(sets):
    found = measure((*sets[:3], torch.full_like(sets[3], -1)), 20)
    assert found[20].top1 == found[20].top5 == 0


def test_images_of_several_labels_get_average_precision(sets):
    train, train_labels, test, test_labels = sets
    wanted, asked = (
        torch.nn.functional.one_hot(each, CLASSES)
        | torch.nn.functional.one_hot((each + 1) % CLASSES, CLASSES)
        for each in (train_labels, test_labels)
    )
    found = measure((train, wanted, test, asked), 10, temperature=0.2)[10]
    unit = torch.nn.functional.normalize(train.double()).numpy()
    scores = []
    for query in test.double().numpy():
        similarity, order = nearest_first(unit, query)
        weights = np.exp(similarity[:10] / 0.2)
        scores.append(weights @ wanted.numpy()[order[:10]] / weights.sum())
    expected = average_precision_score(asked.numpy(), np.array(scores), average="macro")
    assert found.mean == pytest.approx(expected, abs=1e-6)
    assert found.intervals["mAP"].low < found.mean < found.intervals["mAP"].high


def test_more_neighbours_than_images_are_refused(sets):
    with pytest.raises(ConfigError, match="only 300 training images"):
        measure(sets, 20, 301)


@pytest.mark.parametrize(("images", "used"), [(300, (20, 200)), (200, (20, 200)), (199, (20,)), (7, (7,))])
def test_the_usual_neighbours_shrink_to_the_training_images(sets, images, used):
    train, train_labels, test, test_labels = sets
    assert tuple(measure((train[:images], train_labels[:images], test, test_labels))) == used
