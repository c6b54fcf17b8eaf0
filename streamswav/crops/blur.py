"""Gaussian blur with one width an image, as products with banded matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TAPS = 23
BLOCK = 32


@dataclass(frozen=True)
class _Band:
    """A block of output pixels along one axis, and the input pixels that reach it.

    `folds` [taps, inputs * outputs] is 1 where a tap joins an input to an output, borders reflected.
    """

    inputs: slice
    outputs: slice
    folds: Tensor


class Blur:
    """Separable Gaussian blur: 23 taps, fewer where an image is too small to reflect them at its border.

    Per-image kernels make a depthwise convolution whose shape changes at every call; batched products are
    as fast and need no tuning for each shape. Only the band of each matrix is built and multiplied.
    """

    def __init__(self) -> None:
        self._bands: dict[tuple[int, torch.device], list[_Band]] = {}

    def __call__(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Blur square images.

        Args:
            images: float32 [n, 3, S, S], contiguous; overwritten.
            sigma: float32 [n], standard deviations in pixels, positive.

        Returns:
            float32 [n, 3, S, S].
        """
        n, channels, size, _ = images.shape
        bands = self._bands_of(size, images.device)
        weights = _gaussian(sigma, _taps(size))
        matrices = [
            (weights @ band.folds).view(n, _length(band.inputs), _length(band.outputs)) for band in bands
        ]

        rows = images.view(n, channels * size, size)
        half = torch.empty_like(rows)
        for band, matrix in zip(bands, matrices, strict=True):
            torch.bmm(rows[:, :, band.inputs], matrix, out=half[:, :, band.outputs])

        planes, blurred = half.view(n * channels, size, size), images.view(n * channels, size, size)
        for band, matrix in zip(bands, matrices, strict=True):
            filters = matrix.transpose(1, 2).repeat_interleave(channels, dim=0)
            torch.bmm(filters, planes[:, band.inputs], out=blurred[:, band.outputs])
        return images

    def _bands_of(self, size: int, device: torch.device) -> list[_Band]:
        if (size, device) not in self._bands:
            self._bands[size, device] = [
                _band(start, min(start + BLOCK, size), size, device) for start in range(0, size, BLOCK)
            ]
        return self._bands[size, device]


def _taps(size: int) -> int:
    """Reflection without repeating the border reaches at most size - 1 pixels."""
    return min(TAPS, 2 * size - 1)


def _gaussian(sigma: Tensor, taps: int) -> Tensor:
    offsets = torch.arange(taps, device=sigma.device) - taps // 2
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _band(start: int, stop: int, size: int, device: torch.device) -> _Band:
    taps = _taps(size)
    radius = taps // 2
    low, high = max(0, start - radius), min(size, stop + radius)
    sources = torch.arange(start, stop) + torch.arange(-radius, radius + 1)[:, None]
    sources = (size - 1) - ((size - 1) - sources.abs()).abs()
    folds = torch.nn.functional.one_hot(sources - low, high - low).transpose(1, 2)
    return _Band(slice(low, high), slice(start, stop), folds.reshape(taps, -1).float().to(device))


def _length(part: slice) -> int:
    return int(part.stop - part.start)
