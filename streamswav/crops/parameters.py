"""The augmentation of every crop as a row of numbers, drawn where the sample is read."""

from __future__ import annotations

import itertools
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from streamswav.config import CropsSection

DRAWS = 10
"""Uniform numbers that one crop's parameters take."""

ORDERS = tuple(itertools.permutations(range(4)))
"""Every order of the colour jitter's operations: 0 brightness, 1 contrast, 2 saturation, 3 hue."""


class Column(IntEnum):
    """Columns of the parameters, float32 [..., len(Column)]."""

    FLIP = 0
    """1: mirrored left to right."""
    ORDER = 1
    """Index into `ORDERS`; -1: no colour jitter."""
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    """Factors, 1 changes nothing."""
    HUE = 5
    """Turn of the colour circle, -0.5 to 0.5."""
    GRAYSCALE = 6
    """1: colours are dropped."""
    SIGMA = 7
    """Standard deviation of the Gaussian blur in pixels; 0: no blur."""


def draw_parameters(uniforms: NDArray[np.float64], section: CropsSection) -> NDArray[np.float32]:
    """Turn uniform numbers into augmentation parameters, a crop a row (paper, appendix A.2, as SimCLR).

    Args:
        uniforms: float64 [n, DRAWS] in [0, 1).
        section: strengths and probabilities.

    Returns:
        float32 [n, len(Column)].
    """
    flip, jitter, order, brightness, contrast, saturation, hue, grayscale, blur, sigma = uniforms.T
    columns = {
        Column.FLIP: flip < section.flip,
        Column.ORDER: np.where(jitter < section.jitter, np.floor(order * len(ORDERS)), -1),
        Column.BRIGHTNESS: _factor(brightness, section.brightness),
        Column.CONTRAST: _factor(contrast, section.contrast),
        Column.SATURATION: _factor(saturation, section.saturation),
        Column.HUE: (2 * hue - 1) * section.hue,
        Column.GRAYSCALE: grayscale < section.grayscale,
        Column.SIGMA: np.where(blur < section.blur, _between(sigma, *section.blur_sigma), 0),
    }
    return np.stack([columns[column] for column in Column], axis=1).astype(np.float32)


def _factor(uniform: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    return _between(uniform, max(0.0, 1 - strength), 1 + strength)


def _between(uniform: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * uniform
