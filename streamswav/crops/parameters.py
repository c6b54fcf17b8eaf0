"""The augmentation of every crop as a row of numbers, drawn where the sample is read."""

from __future__ import annotations

import itertools
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from streamswav.config import CropsSection

PARAMETER_DRAWS = 10
"""Uniform numbers that one crop's parameters take."""

ORDERS = tuple(itertools.permutations(range(4)))
"""Every order of the colour jitter's operations: 0 brightness, 1 contrast, 2 saturation, 3 hue."""


class Column(IntEnum):
    """Columns of the parameters, float32 [..., len(Column)]."""

    FLIP = 0
    """1: mirrored left to right."""
    GRAYSCALE = 1
    """1: colours are dropped."""
    ORDER = 2
    """Index into `ORDERS`; -1: no colour jitter."""
    SIGMA = 3
    """Standard deviation of the Gaussian blur in pixels; 0: no blur."""
    BRIGHTNESS = 4
    CONTRAST = 5
    SATURATION = 6
    """Factors, 1 changes nothing."""
    HUE = 7
    """Turn of the colour circle, -0.5 to 0.5."""


class ParameterLaw:
    """The distribution of the augmentation's parameters (paper, appendix A.2, as SimCLR)."""

    def __init__(self, section: CropsSection) -> None:
        self._probabilities = np.array((section.flip, section.grayscale, section.jitter, section.blur))
        factors = (
            (max(0.0, 1 - strength), 1 + strength)
            for strength in (section.brightness, section.contrast, section.saturation)
        )
        ranges = np.array(((0, len(ORDERS)), section.blur_sigma, *factors, (-section.hue, section.hue)))
        self._low, self._span = ranges[:, 0], ranges[:, 1] - ranges[:, 0]

    def draw(self, uniforms: NDArray[np.float64]) -> NDArray[np.float32]:
        """Turn uniform numbers into parameters, a crop a row.

        Args:
            uniforms: float64 [n, PARAMETER_DRAWS] in [0, 1).

        Returns:
            float32 [n, len(Column)].
        """
        happens = uniforms[:, :4] < self._probabilities
        rows = np.empty((len(uniforms), len(Column)), dtype=np.float32)
        rows[:, : Column.ORDER] = happens[:, :2]
        values = self._low + self._span * uniforms[:, 4:]
        rows[:, Column.ORDER :] = values
        rows[:, Column.ORDER] = np.where(happens[:, 2], np.floor(values[:, 0]), -1)
        rows[:, Column.SIGMA] *= happens[:, 3]
        return rows
