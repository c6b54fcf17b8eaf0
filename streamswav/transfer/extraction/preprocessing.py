"""What is done to an image that is measured or embedded: no crop at random, nothing else by chance."""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.config import CropsSection
from streamswav.errors import ConfigError

_SMALL_IMAGE = 64


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image of an evaluation.

    Attributes:
        resize: length of the shorter side in pixels.
        crop: S, edge of the square that is then cut from the centre.
        mean: of the normalisation, by channel, of 0 to 1.
        std: of the normalisation.
        max_pixels: larger images are skipped undecoded.
        exif_orientation: turn images by their EXIF orientation.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_pixels: int
    exif_orientation: bool = False


def choose_preprocessing(
    crops: CropsSection, *, resize: int | None = None, crop: int | None = None
) -> Preprocessing:
    """Complete what is not given from a run's crops, and normalise as the run did.

    Raises:
        ConfigError: a crop larger than the resized image.
    """
    crop = crop or crops.sizes[0]
    resize = resize or (crop if crop < _SMALL_IMAGE else round(crop * 256 / 224))
    if resize < crop:
        raise ConfigError("--resize", f"smaller than the crop ({crop})", value=resize)
    return Preprocessing(resize, crop, crops.mean, crops.std, crops.max_pixels, crops.exif_orientation)
