from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_runs import published_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.nn import functional as F

from streamswav.swav import sinkhorn


def similarities(batch: int, prototypes: int, *, dim: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(batch, dim, generator=generator), dim=1)
    return embeddings @ F.normalize(torch.randn(prototypes, dim, generator=generator), dim=1).T


@given(
    values=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 24), st.integers(2, 24)),
        elements=st.floats(-1, 1, width=32),
    ),
    epsilon=st.floats(0.001, 1),
    iterations=st.integers(1, 10),
)
@settings(max_examples=300, deadline=None)
def test_codes_are_those_of_the_published_algorithm(
    values: np.ndarray[Any, np.dtype[np.float32]], epsilon: float, iterations: int
) -> None:
    scores = torch.from_numpy(values)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(
        codes.double(), published_codes(scores, epsilon, iterations), rtol=0, atol=5e-7
    )


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.01, 0.001])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_many_samples_lose_no_precision(epsilon: float, iterations: int) -> None:
    scores = similarities(1000, 300)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(
        codes.double(), published_codes(scores, epsilon, iterations), rtol=0, atol=5e-7
    )


def test_one_sample_far_from_everything_still_has_a_code() -> None:
    scores = torch.full((64, 32), 1.0)
    scores[5] = torch.linspace(-1, -0.99, 32)
    codes = sinkhorn(scores, epsilon=0.001)
    torch.testing.assert_close(codes.double(), published_codes(scores, 0.001, 3), rtol=0, atol=5e-7)
    assert codes[5].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("epsilon", [0.05, 0.001])
@pytest.mark.parametrize("iterations", [6, 30, 100])
def test_many_iterations_stay_finite_and_exact(epsilon: float, iterations: int) -> None:
    scores = similarities(64, 300, dim=4)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(
        codes.double(), published_codes(scores, epsilon, iterations), rtol=0, atol=5e-7
    )


def test_the_codes_of_the_last_rows_alone_are_the_same() -> None:
    scores = torch.stack([similarities(300, 10, seed=seed) for seed in range(2)])
    assert torch.equal(sinkhorn(scores, rows=40), sinkhorn(scores)[:, -40:])


@pytest.mark.parametrize("iterations", [3, 7])
def test_in_place_the_codes_are_the_same(iterations: int) -> None:
    scores = similarities(300, 10)
    expected = sinkhorn(scores, iterations=iterations)
    assert torch.equal(sinkhorn(scores.clone(), iterations=iterations, inplace=True), expected)


def test_in_place_no_second_matrix_is_made() -> None:
    scores = similarities(300, 10)
    assert sinkhorn(scores, inplace=True, rows=100).data_ptr() == scores[200:].data_ptr()


def test_codes_sum_to_one_per_sample() -> None:
    codes = sinkhorn(similarities(64, 30))
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(64))


def test_prototypes_receive_nearly_equal_shares() -> None:
    scores = similarities(512, 30, dim=4)
    uneven = ((scores / 0.05).softmax(dim=1).mean(dim=0) * 30 - 1).abs().max()
    assert (sinkhorn(scores, iterations=30).mean(dim=0) * 30 - 1).abs().max() < 0.1 * uneven


def test_codes_rise_with_the_score() -> None:
    scores = similarities(256, 30)
    raised = scores.clone()
    raised[0, 7] += 0.5
    assert sinkhorn(raised)[0, 7] > sinkhorn(scores)[0, 7]


def test_without_iterations_codes_are_a_softmax() -> None:
    scores = similarities(16, 8)
    torch.testing.assert_close(sinkhorn(scores, iterations=0), (scores / 0.05).softmax(dim=1))


def test_leading_dimensions_are_independent() -> None:
    scores = torch.stack([similarities(32, 10, seed=seed) for seed in range(6)]).unflatten(0, (2, 3))
    codes = sinkhorn(scores)
    assert codes.shape == scores.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(codes[i, j], sinkhorn(scores[i, j]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    scores = similarities(32, 10).to(dtype)
    codes = sinkhorn(scores, epsilon=0.01)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.double(), published_codes(scores, 0.01, 3), rtol=0, atol=5e-7)


def test_float64_scores_keep_their_precision() -> None:
    scores = similarities(32, 10).double()
    torch.testing.assert_close(sinkhorn(scores), published_codes(scores, 0.05, 3), rtol=0, atol=1e-14)


def test_autocast_changes_nothing() -> None:
    scores = similarities(32, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn(scores)
    assert torch.equal(inside, sinkhorn(scores))


def test_scores_are_left_as_they_were_and_get_no_gradient() -> None:
    scores = similarities(32, 10).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize(
    ("name", "value"), [("epsilon", 0.0), ("epsilon", -0.05), ("epsilon", float("nan")), ("iterations", -1)]
)
def test_settings_that_have_no_codes_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* not {value}"):
        sinkhorn(torch.zeros(2, 3), **{name: value})


def test_more_rows_than_there_are_cannot_be_returned() -> None:
    with pytest.raises(ValueError, match="rows must be 0 to 2, the number of samples, not 3"):
        sinkhorn(torch.zeros(2, 3), rows=3)
