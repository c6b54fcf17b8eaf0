"""Where the crops of an image lie, and how small it may be decoded for them. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ATTEMPTS = 10
BOX_DRAWS = 2 * ATTEMPTS + 2
"""Uniform numbers that one box takes."""

JPEG_SCALES = (4, 2)
MARGIN = 1.25


def draw_boxes(
    uniforms: NDArray[np.float64],
    *,
    height: int,
    width: int,
    scales: NDArray[np.float64],
    aspect: tuple[float, float],
) -> NDArray[np.int64]:
    """Draw one box a row, by the rule of torchvision's `RandomResizedCrop` (paper, appendix A.2).

    A share of the image's area is drawn uniformly and an aspect ratio log-uniformly, ten times over; the
    first pair that fits is placed uniformly. Where none fits, the box is the largest centred one whose
    aspect ratio is allowed.

    Args:
        uniforms: float64 [n, BOX_DRAWS] in [0, 1).
        height: of the image, in pixels.
        width: of the image, in pixels.
        scales: float64 [n, 2], smallest and largest share of the image's area.
        aspect: smallest and largest width over height.

    Returns:
        int64 [n, 4]: top, left, height, width in pixels, inside the image.
    """
    low, high = scales.T[:, :, None]
    roots = np.sqrt(height * width * (low + (high - low) * uniforms[:, :ATTEMPTS]))
    log_low, log_high = math.log(aspect[0]) / 2, math.log(aspect[1]) / 2
    stretches = np.exp(log_low + (log_high - log_low) * uniforms[:, ATTEMPTS : 2 * ATTEMPTS])

    limits = np.array(((height,), (width,)))
    sides = np.empty((2, len(roots), ATTEMPTS))
    np.divide(roots, stretches, out=sides[0])
    np.multiply(roots, stretches, out=sides[1])
    np.rint(sides, out=sides)
    inside = (sides > 0) & (sides <= limits[:, :, None])
    fits = inside[0] & inside[1]
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    sides = sides[:, rows, first]

    boxes = np.empty((len(fits), 4), dtype=np.int64)
    boxes[:, :2] = (uniforms[:, 2 * ATTEMPTS :].T * (limits - sides + 1)).T
    boxes[:, 2:] = sides.T
    boxes[~fits[rows, first]] = _central_box(height, width, aspect)
    return boxes


def decoding_scale(boxes: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """Return the k of the smallest JPEG scale 1/k (1, 2 or 4) that no crop notices.

    Every box must still have `MARGIN` times the pixels of its crop along either side. At exactly the crop's
    size the sharper filter of the scaled transform shows, at this margin it does not
    (`ops/decisions/005-augmentation.md` has the figures).

    Args:
        boxes: int64 [n, 4]: top, left, height, width.
        sizes: int64 [n], edges of the crops in pixels.
    """
    slack = (boxes[:, 2:].min(axis=1) / sizes).min()
    return next((k for k in JPEG_SCALES if slack >= k * MARGIN), 1)


def _central_box(height: int, width: int, aspect: tuple[float, float]) -> tuple[int, int, int, int]:
    low, high = aspect
    box_height, box_width = height, width
    if width / height < low:
        box_height = round(width / low)
    elif width / height > high:
        box_width = round(height * high)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
