"""From the bytes of an image to its crops, uint8, and the parameters of their augmentation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamswav.config import CropsSection
from streamswav.crops.boxes import BOX_DRAWS, decoding_scale, draw_boxes
from streamswav.crops.decode import decode, image_size
from streamswav.crops.parameters import PARAMETER_DRAWS, ParameterLaw
from streamswav.errors import DecodeError
from streamswav.philox import uniforms


@dataclass(frozen=True)
class Crops:
    """The crops of one sample."""

    pixels: tuple[Tensor, ...]
    """A resolution each: uint8 [count, S, S, 3]."""
    parameters: Tensor
    """float32 [crops, len(Column)], in the order of the resolutions."""
    decode_seconds: float = field(default=0.0, compare=False)
    """How long the image took to decode."""


class MultiCrop:
    """Multi-crop (paper, section 3.2): several random crops of one image, at several resolutions."""

    def __init__(self, section: CropsSection, *, seed: int) -> None:
        self._section, self._seed = section, seed
        self._law = ParameterLaw(section)
        self._sizes = np.repeat(np.array(section.sizes), section.counts)
        self._scales = np.repeat(np.array(section.scales, dtype=np.float64), section.counts, axis=0)

    def __call__(self, image: bytes, *, key: tuple[int, ...]) -> Crops:
        """Decode the image once and cut all its crops.

        Args:
            image: an encoded image.
            key: what the random numbers depend on beside the seed: (pass, hash of shard key, ordinal).

        Raises:
            DecodeError: the image cannot be used.
        """
        section = self._section
        height, width = image_size(image, exif_orientation=section.exif_orientation)
        for_boxes, for_augmentation = self._uniforms(key)
        boxes = draw_boxes(for_boxes, height=height, width=width, scales=self._scales, aspect=section.aspect)
        began = time.perf_counter()
        pixels = decode(
            image,
            max_pixels=section.max_pixels,
            scale=decoding_scale(boxes, self._sizes),
            exif_orientation=section.exif_orientation,
        )
        seconds = time.perf_counter() - began
        crops = self._cut(pixels, _rescale(boxes, (height, width), pixels.shape[:2]))
        return Crops(crops, torch.from_numpy(self._law.draw(for_augmentation)), seconds)

    def _uniforms(self, key: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        draws = BOX_DRAWS + PARAMETER_DRAWS
        rows = uniforms(len(self._sizes) * draws, "crops", self._seed, *key).reshape(-1, draws)
        return rows[:, :BOX_DRAWS], rows[:, BOX_DRAWS:]

    def _cut(self, pixels: NDArray[np.uint8], boxes: NDArray[np.int64]) -> tuple[Tensor, ...]:
        remaining = iter(boxes.tolist())
        resolutions = []
        for size, count in zip(self._section.sizes, self._section.counts, strict=True):
            parts = (
                pixels[top : top + height, left : left + width]
                for top, left, height, width in itertools.islice(remaining, count)
            )
            crops = torch.cat([_resize(part, size, size) for part in parts])
            resolutions.append(crops.permute(0, 2, 3, 1).contiguous())
        return tuple(resolutions)


def collate(samples: Sequence[Crops]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Stack the crops of a batch, crop-major.

    Returns:
        pixels, a resolution each: uint8 [count, B, S, S, 3]; and parameters: float32 [crops, B, columns],
        which `parameters.split(counts)` deals to the resolutions.
    """
    pixels = tuple(torch.stack(crops, dim=1) for crops in zip(*(s.pixels for s in samples), strict=True))
    return pixels, torch.stack([sample.parameters for sample in samples], dim=1)


def centre_crop(
    image: bytes, *, resize: int, crop: int, max_pixels: int, exif_orientation: bool = False
) -> NDArray[np.uint8]:
    """Evaluate on this: the shorter side resized to `resize`, then the central square (paper, appendix A.3).

    Args:
        image: an encoded image.
        resize: shorter side after resizing, in pixels.
        crop: edge of the square, at most `resize`.
        max_pixels: bound on the image, before and after resizing.
        exif_orientation: turn the image by its EXIF orientation.

    Returns:
        uint8 [crop, crop, 3].

    Raises:
        DecodeError: the image cannot be used.
        ValueError: the crop does not fit.
    """
    if crop > resize:
        raise ValueError(f"a crop of {crop} does not fit into a shorter side of {resize}")
    height, width = image_size(image, exif_orientation=exif_orientation)
    shorter = min(height, width)
    new_height, new_width = resize * height // shorter, resize * width // shorter
    if new_height * new_width > max_pixels:
        raise DecodeError("too_large", f"{height} x {width} is too long to be resized to {resize}")
    box = np.array([[0, 0, height, width]])
    scale = decoding_scale(box, np.array([resize]))
    pixels = decode(image, max_pixels=max_pixels, scale=scale, exif_orientation=exif_orientation)
    top, left = round((new_height - crop) / 2), round((new_width - crop) / 2)
    resized = _resize(pixels, new_height, new_width)[0].permute(1, 2, 0)
    return resized[top : top + crop, left : left + crop].contiguous().numpy()


def _rescale(boxes: NDArray[np.int64], drawn: tuple[int, int], decoded: tuple[int, ...]) -> NDArray[np.int64]:
    """Move boxes from the header's size to the decoded one, edges to the nearest pixel."""
    if drawn == decoded:
        return boxes
    ratio = np.array(decoded) / np.array(drawn)
    corners = np.rint(boxes[:, :2] * ratio)
    edges = np.rint((boxes[:, :2] + boxes[:, 2:]) * ratio)
    return np.concatenate((corners, np.maximum(edges - corners, 1)), axis=1).astype(np.int64)


def _resize(pixels: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Resize [H, W, 3] to [1, 3, height, width], bilinear, antialiased.

    PyTorch's fast path for bytes wants them contiguous, channels last, down to the strides of the batch
    dimension: hence a copy in C order, where NumPy's default would leave that stride to chance.
    """
    batch = torch.from_numpy(np.array(pixels[None], order="C")).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(batch, size=(height, width), mode="bilinear", antialias=True)
