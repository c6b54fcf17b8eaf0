"""One crop of an image with RandAugment; loader processes import torchvision for it, so it stands alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torchvision.transforms import InterpolationMode, RandAugment

from streamswav.config import CropsSection, FinetuneSection
from streamswav.crops.multicrop import Crops, MultiCrop
from streamswav.philox import words


class RandAugmentCrop(MultiCrop):
    """Crops, and applies RandAugment (Cubuk et al., 2019), torchvision's, in the loader process.

    Its random numbers are keyed by the sample, as the crop's are; torch's own state stays as it is.

    Args:
        section: of the crops.
        augmentation: operations and their strength.
        seed: of the run.
    """

    def __init__(self, section: CropsSection, augmentation: FinetuneSection, *, seed: int) -> None:
        super().__init__(section, seed=seed)
        fill = [round(255 * channel) for channel in section.mean]
        self._augment = RandAugment(
            augmentation.rand_augment,
            augmentation.rand_augment_magnitude,
            interpolation=InterpolationMode.BILINEAR,
            fill=fill,
        )
        self._key = seed

    def __call__(self, image: bytes, *, key: tuple[int, ...]) -> Crops:
        """Decode, crop, augment; as `MultiCrop` does, with the same random crops."""
        crops = super().__call__(image, key=key)
        ((pixels,),) = crops.pixels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(words(1, "rand_augment", self._key, *key)[0] >> 1))
            augmented = self._augment(pixels.permute(2, 0, 1))
        return replace(crops, pixels=(augmented.permute(1, 2, 0)[None].contiguous(),))
