"""Intervals against published values, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from streamswav.transfer.measuring.intervals import Interval, difference, over_seeds, student, wilson


@pytest.mark.parametrize(
    ("hits", "images"), [(0, 10), (10, 10), (7, 10), (815, 1000), (37850, 50000), (1, 1)]
)
def test_wilsons_interval_is_scipys(hits, images):
    expected = stats.binomtest(hits, images).proportion_ci(method="wilson")
    found = wilson(hits / images, images)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low <= hits / images <= found.high


def test_without_images_nothing_is_known():
    assert wilson(0.0, 0) == Interval(0.0, 1.0, "Wilson")


@pytest.mark.parametrize("degrees", [1, 2, 4, 10, 30, 31, 60, 1000])
def test_students_quantile_is_scipys(degrees):
    assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=2.5e-3)


def test_the_interval_over_seeds_is_that_of_the_mean():
    shares = [0.71, 0.74, 0.69, 0.73, 0.72]
    expected = stats.t.interval(0.95, 4, np.mean(shares), stats.sem(shares))
    found = over_seeds(shares)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)
    assert over_seeds([0.7]) is None


def test_a_difference_has_newcombes_interval():
    # Newcombe (1998), Interval estimation for the difference between independent proportions, table II (a).
    found = difference(48 / 80, wilson(48 / 80, 80), 56 / 70, wilson(56 / 70, 70))
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference(0.5, None, 0.6, wilson(0.6, 10)) is None


def test_a_difference_of_nothing_lies_around_zero():
    low, high = difference(0.5, wilson(0.5, 100), 0.5, wilson(0.5, 100))
    assert low == pytest.approx(-high)
    assert high == pytest.approx(math.sqrt(2) * (wilson(0.5, 100).high - 0.5))
