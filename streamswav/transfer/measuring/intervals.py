"""Intervals of 95% confidence: for shares of images, for means over seeds, for differences of two figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95

_Z = 1.959963984540054
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Interval:
    """Where a figure lies with 95% confidence.

    Attributes:
        low: its lower end.
        high: its upper end.
        method: how it was found: `Wilson`, `bootstrap`, `t over seeds`.
    """

    low: float
    high: float
    method: str


def wilson(share: float, images: int) -> Interval:
    """Return Wilson's score interval of a share of so many images that are taken to be independent.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not images:
        return Interval(0.0, 1.0, "Wilson")
    square = _Z * _Z / images
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / images + square / (4 * images)) / (1 + square)
    # At a share of 0 or 1 its end is that share, which rounding would miss.
    low = 0.0 if share <= 0 else max(0.0, middle - half)
    return Interval(low, 1.0 if share >= 1 else min(1.0, middle + half), "Wilson")


def over_seeds(shares: Sequence[float]) -> Interval | None:
    """Return the interval of the mean of one share a seed, by Student's t; None for less than two seeds."""
    if len(shares) < 2:
        return None
    half = student(len(shares) - 1) * stdev(shares) / math.sqrt(len(shares))
    return Interval(fmean(shares) - half, fmean(shares) + half, "t over seeds")


def student(degrees: int) -> float:
    """Return the quantile of Student's t at 97.5%, to 0.002."""
    return _T[degrees - 1] if degrees <= len(_T) else _Z + 2.4 / degrees


def difference(
    before: float, its: Interval | None, after: float, other: Interval | None
) -> tuple[float, float] | None:
    """Return the 95% interval of `after - before`, from each one's own; None where one has none.

    The distances to the ends are added as squares (Newcombe's method 10, for any interval), as if both were
    measured on images of their own. On the same test images errors are shared, and the true interval is
    narrower.
    """
    if its is None or other is None:
        return None
    change = after - before
    down = math.hypot(after - other.low, its.high - before)
    up = math.hypot(other.high - after, before - its.low)
    return change - down, change + up
