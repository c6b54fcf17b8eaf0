"""Pictures for tests: noise whose spectrum falls as that of photographs, and encoders."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photograph(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Colour noise at every scale, the coarse stronger; uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    cells = 2
    while cells <= 2 * max(height, width):
        grid = (min(cells, height), min(cells, width), 3)
        noise = rng.uniform(-1, 1, grid) * np.array((1.0, 0.9, 0.8))
        octave = Image.fromarray(np.uint8(127 + 127 * noise)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        total += (np.asarray(octave) - 127.0) / cells**0.5
        cells *= 2
    total = 128 + 90 * total / np.abs(total).mean() / 2
    return np.clip(total, 0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], kind: str = "JPEG", *, mode: str = "RGB", **options: Any) -> bytes:
    """Encode uint8 [H, W, 3] with Pillow, after turning it into `mode`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()
