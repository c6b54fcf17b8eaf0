"""Health of the representation against formulas in float64, on cases whose health is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamswav.telemetry import representation
from streamswav.telemetry.representation import (
    Moments,
    Window,
    crop_agreement,
    effective_rank,
    entropy,
    gradient_norms,
    spread,
    staleness,
    unique_prototypes,
    usage,
)

DIM, PROTOTYPES = 64, 100


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def of_rank(rank: int, rows: int, dim: int = DIM) -> Tensor:
    """Features that fill `rank` directions alike."""
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)).double())[0]
    turns = torch.linalg.qr(torch.randn(rows, rank, generator=torch.Generator().manual_seed(2)).double())[0]
    return turns @ basis[:rank]


def rankme(features: np.ndarray) -> float:
    """The definition, word for word."""
    values = np.linalg.svd(features, compute_uv=False)
    p = values / values.sum()
    return float(np.exp(-np.sum(p * np.log(p + 1e-300))))


def make_window(prototypes: int = PROTOTYPES) -> Window:
    device = torch.device("cpu")
    return Window(prototypes, assigned=(0, 1), temperature=0.1, device=device)


def fill(window: Window, embeddings: Tensor, prototypes: Tensor, *, skipped: bool = False) -> None:
    """A step of embeddings [N, B, D], which stand for the features as well."""
    scores = embeddings @ prototypes.T
    window.add(embeddings, scores, embeddings, skipped=torch.tensor(skipped))


def read(window: Window, **more: float) -> dict[str, float]:
    return window.read(lambda values: values)


def test_the_spread_of_points_that_fill_the_sphere_is_1() -> None:
    points = unit(20_000, DIM)
    assert float(spread(points)) == pytest.approx(1.0, abs=0.01)
    by_hand = points.double().numpy().std(axis=0, ddof=1).mean() * math.sqrt(DIM)
    assert float(spread(points)) == pytest.approx(by_hand, rel=1e-5)


def test_the_spread_of_one_point_is_0() -> None:
    assert float(spread(unit(1, DIM).expand(100, DIM))) == pytest.approx(0.0, abs=1e-5)


def test_the_spread_is_blind_to_a_plane_and_the_rank_is_not() -> None:
    plane = normalize(of_rank(10, 2000), dim=1)
    assert float(spread(plane)) > 0.9
    assert float(effective_rank(plane.T @ plane)) == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rankme_of_ten_equal_directions_is_ten(scale: float) -> None:
    features = scale * of_rank(10, 2000)
    assert float(effective_rank(features.T @ features)) == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_rankme_is_that_of_the_singular_values(shift: float) -> None:
    """Not centred: a common offset, as pooled rectified features have, counts as a direction."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(500, DIM, generator=generator).double() * torch.logspace(0, -3, DIM) + shift
    assert float(effective_rank(features.T @ features)) == pytest.approx(rankme(features.numpy()), rel=1e-6)


def test_rankme_of_constant_float32_features_is_1() -> None:
    moments = Moments()
    for _ in range(20):
        moments.add(unit(1, DIM).expand(64, DIM))
    assert moments.rank() == pytest.approx(1.0, abs=1e-3)


def test_rankme_of_healthy_noise_is_nearly_its_dimensions() -> None:
    moments, rows = Moments(), unit(64 * 40, DIM)
    for each in rows.split(64):
        moments.add(each)
    found = moments.rank()
    assert found == pytest.approx(rankme(rows.double().numpy()), rel=1e-6)
    assert found > 0.95 * DIM


def test_rankme_waits_for_as_many_rows_as_it_needs_and_holds_until_there_are_new_ones() -> None:
    moments = Moments()
    rows = unit(int(representation.RANK_ROWS * DIM), DIM)
    moments.add(rows[:-1])
    assert moments.rank() is None
    moments.add(rows[-1:])
    first = moments.rank()
    assert first is not None
    moments.add(unit(1, DIM).expand(700, DIM))
    assert moments.rank() == first  # too few since
    moments.add(unit(1, DIM).expand(100, DIM))
    assert moments.rank() == pytest.approx(1.0, abs=1e-3)  # of the new ones alone


def test_very_wide_features_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation, "WIDEST", 16)
    moments = Moments()
    rows = unit(1000, 40)
    moments.add(rows)
    assert moments.rank() == pytest.approx(rankme(rows[:, ::3].double().numpy()), rel=1e-6)


def test_agreement_counts_the_pairs_of_the_loss() -> None:
    best = torch.tensor([[0, 1, 2, 3], [0, 1, 9, 9], [0, 8, 2, 8]])
    # 0-1: 2 of 4, 0-2: 2 of 4, 1-0: 2 of 4, 1-2: 1 of 4
    assert float(crop_agreement(best, (0, 1))) == pytest.approx((2 + 2 + 2 + 1) / 16)


@pytest.mark.parametrize(("rows", "found"), [(1, 1.0), (50, 1.0), (100_000, 1.0)])
def test_as_many_prototypes_as_chance_would_show_are_all(rows: int, found: float) -> None:
    drawn = np.random.default_rng(0).integers(0, PROTOTYPES, size=(200, rows)) if rows < 1000 else None
    used = PROTOTYPES if drawn is None else np.mean([len(set(each)) for each in drawn])
    assert usage(round(float(used)), rows, PROTOTYPES) == pytest.approx(found, abs=0.03)


def test_usage_of_a_long_window_is_a_share_of_the_prototypes() -> None:
    assert usage(7, 100_000, PROTOTYPES) == pytest.approx(0.07)
    assert usage(1, 512, 3000) < 0.003


def test_duplicates_count_once() -> None:
    prototypes = unit(50, 128)
    assert float(unique_prototypes(prototypes)) == 1.0
    assert float(unique_prototypes(torch.cat([prototypes, prototypes]))) == pytest.approx(0.5)
    assert float(unique_prototypes(prototypes[:1].expand(50, 128))) == pytest.approx(1 / 50)
    near = normalize(prototypes + 0.1 * unit(50, 128, seed=4), dim=1)  # cosine .995
    far = normalize(prototypes + 0.5 * unit(50, 128, seed=4), dim=1)  # cosine .89
    assert float(unique_prototypes(torch.cat([prototypes, near]))) == pytest.approx(0.5)
    assert float(unique_prototypes(torch.cat([prototypes, far]))) == 1.0


def test_of_many_prototypes_some_are_held_against_all() -> None:
    prototypes = unit(600, 128)
    both = torch.stack([prototypes, prototypes], dim=1).flatten(0, 1)[torch.randperm(1200)]
    assert float(unique_prototypes(both, compared=400)) == pytest.approx(0.5, abs=0.08)


def test_a_queue_of_a_network_that_stands_still_is_fresh() -> None:
    prototypes = unit(PROTOTYPES, DIM)
    assert float(staleness(unit(4000, DIM, seed=5), prototypes, 0.1)) < 0.02


def test_a_queue_whose_older_half_lies_elsewhere_is_stale() -> None:
    prototypes = unit(PROTOTYPES, DIM)
    new = normalize(prototypes[0] + 0.5 * unit(2000, DIM, seed=6), dim=1)
    old = normalize(prototypes[1] + 0.5 * unit(2000, DIM, seed=7), dim=1)
    moved = float(staleness(torch.cat([new, old]), prototypes, 0.1))
    assert moved > 0.9
    softly = float(staleness(torch.cat([new, new[:1800], old[:200]]), prototypes, 0.1))
    assert 0.05 < softly < 0.2  # a tenth of the older half moved


def test_a_queue_of_two_has_no_staleness() -> None:
    assert float(staleness(unit(2, DIM), unit(PROTOTYPES, DIM), 0.1)) == 0.0


def test_gradient_norms_by_part_make_up_that_of_all() -> None:
    trunk, head = nn.Linear(4, 3), nn.Linear(3, 2)
    head(trunk(torch.randn(5, 4))).square().sum().backward()
    resting = nn.Linear(2, 2)
    parts = {"trunk": trunk.parameters(), "head": head.parameters(), "prototypes": resting.parameters()}
    norms = gradient_norms(parts)
    assert set(norms) == {"gradient_norm/trunk", "gradient_norm/head", "gradient_norm/all"}
    by_hand = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in trunk.parameters() if p.grad is not None)
    )
    assert norms["gradient_norm/trunk"] == pytest.approx(by_hand, rel=1e-5)
    assert norms["gradient_norm/all"] == pytest.approx(
        math.hypot(norms["gradient_norm/trunk"], norms["gradient_norm/head"]), rel=1e-5
    )


def test_a_healthy_window() -> None:
    window, prototypes = make_window(), unit(PROTOTYPES, DIM)
    for step in range(20):
        image = unit(1, 256, DIM, seed=10 + step)
        fill(window, normalize(image + 0.3 * unit(3, 256, DIM, seed=100 + step), dim=-1), prototypes)
    found = read(window)
    assert found["ln_prototypes"] == pytest.approx(math.log(PROTOTYPES))
    assert found["prototype_usage_ratio"] == 1.0
    assert found["embedding_std_ratio"] == pytest.approx(1.0, abs=0.05)
    assert found["assignment_entropy_ratio"] > 0.98
    assert found["embedding_rankme"] > 0.9 * DIM
    assert found["rankme"] > 0.9 * DIM
    assert 0.3 < found["crop_agreement_ratio"] < 1


def test_a_window_of_one_point() -> None:
    window, prototypes = make_window(), unit(PROTOTYPES, DIM)
    for _ in range(20):
        fill(window, unit(1, DIM).expand(3, 256, DIM), prototypes)
    found = read(window)
    assert found["prototype_usage_ratio"] == pytest.approx(1 / PROTOTYPES)
    assert found["embedding_std_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert found["assignment_information_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert found["crop_agreement_ratio"] == 1.0
    assert found["embedding_rankme"] == pytest.approx(1.0, abs=1e-3)


def test_a_window_with_dead_prototypes() -> None:
    """Nine of ten lie opposite to all embeddings."""
    window = make_window()
    prototypes = torch.cat([unit(10, DIM), -unit(1, DIM).expand(90, DIM)])
    for step in range(20):
        near = unit(10, DIM)[torch.arange(256) % 10]
        fill(window, normalize(near + 0.2 * unit(3, 256, DIM, seed=step), dim=-1), prototypes)
    found = read(window)
    assert found["prototype_usage_ratio"] == pytest.approx(0.1)
    assert found["assignment_entropy_ratio"] < math.log(12) / math.log(PROTOTYPES)
    assert float(unique_prototypes(prototypes)) == pytest.approx(0.11)


def test_the_mean_assignment_and_its_information_are_the_formulas() -> None:
    window, prototypes = make_window(), unit(PROTOTYPES, DIM)
    embeddings = unit(2, 64, DIM, seed=8)
    fill(window, embeddings, prototypes)
    found = read(window)
    shares = torch.softmax(embeddings.double().flatten(0, 1) @ prototypes.double().T / 0.1, dim=1)
    whole, within = float(entropy(shares.mean(dim=0))), float(entropy(shares).mean())
    assert found["assignment_entropy_ratio"] == pytest.approx(whole / math.log(PROTOTYPES), rel=1e-5)
    information = (whole - within) / math.log(PROTOTYPES)
    assert found["assignment_information_ratio"] == pytest.approx(information, rel=1e-4)


def test_a_skipped_step_leaves_nothing_behind() -> None:
    one, other, prototypes = make_window(), make_window(), unit(PROTOTYPES, DIM)
    for step in range(20):
        embeddings = unit(2, 64, DIM, seed=step)
        fill(one, embeddings, prototypes)
        fill(other, embeddings, prototypes)
        fill(other, torch.full_like(embeddings, torch.nan), prototypes, skipped=True)
    expected, found = read(one), read(other)
    assert expected.pop("prototype_usage_ratio") == found.pop("prototype_usage_ratio")
    assert found == pytest.approx(expected, rel=1e-6)


def test_readings_are_those_of_all_ranks_together() -> None:
    """Two ranks of half the images each, against one that has all."""
    prototypes = unit(PROTOTYPES, DIM)
    alone, first, second = make_window(), make_window(), make_window()
    for step in range(10):
        halves = unit(2, 32, DIM, seed=step), unit(2, 32, DIM, seed=50 + step)
        fill(first, halves[0], prototypes)
        fill(second, halves[1], prototypes)
        fill(alone, torch.cat(halves, dim=1), prototypes)
    parts: list[Tensor] = []
    second.read(lambda values: parts.append(values) or values, ranks=2, leads=False)
    found = first.read(lambda values: values + parts[0], ranks=2)
    expected = read(alone)
    for name in ("prototype_usage_ratio", "assignment_entropy_ratio", "crop_agreement_ratio"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_a_window_begins_anew_once_it_was_long_enough() -> None:
    window, prototypes = make_window(), unit(PROTOTYPES, DIM)
    for step in range(20):
        fill(window, unit(2, 256, DIM, seed=step), prototypes)
    assert read(window)["prototype_usage_ratio"] == 1.0
    fill(window, unit(1, DIM).expand(2, 256, DIM), prototypes)
    assert read(window)["prototype_usage_ratio"] < 0.02
