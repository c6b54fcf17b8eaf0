"""What a trunk is measured beside: itself before training, and the pixels it sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamswav.models import Trunk
from streamswav.transfer.weights.trunks import TrunkInfo, untrained_trunk

BASELINES = ("untrained", "pixels")

_PIXELS_EDGE = 32


class RawPixels(nn.Module):
    """Takes the place of a trunk: the pixels themselves, from 0 to 1, as features.

    Args:
        edge: larger images are brought to this many pixels a side.
        mean: of the normalisation that is undone.
        std: likewise.

    Attributes:
        feature_dim: F = 3 * edge * edge, for images of at least that size.
    """

    def __init__(self, edge: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._edge, self.feature_dim = edge, 3 * edge * edge
        self._mean, self._std = (torch.tensor(each)[:, None, None] for each in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images [B, 3, S, S] as [B, F]."""
        plain = images * self._std.to(images.device) + self._mean.to(images.device)
        size = (self._edge, self._edge)
        return F.interpolate(plain, size=size, mode="bilinear", antialias=True).flatten(1)

    def extra_repr(self) -> str:
        """Tell what decides the features."""
        return f"edge={self._edge}, mean={self._mean.flatten().tolist()}, std={self._std.flatten().tolist()}"


class SideBySide(nn.Module):
    """Several modules on the same images, their features joined: images are read and decoded once."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images: Tensor) -> Tensor:
        """Return images [B, 3, S, S] as the parts' features, one after the other [B, F]."""
        return torch.cat([part(images) for part in self.parts], dim=1)


def make_columns(
    trunk: Trunk, info: TrunkInfo, baselines: Sequence[str], *, crop: int
) -> dict[str, Trunk | RawPixels]:
    """Return the trunk and its baselines by name, for images of so many pixels a side."""
    columns: dict[str, Trunk | RawPixels] = {"checkpoint": trunk}
    if "untrained" in baselines:
        columns["untrained"] = untrained_trunk(info.config, info.config.stream.seed)
    if "pixels" in baselines:
        crops = info.config.crops
        columns["pixels"] = RawPixels(min(crop, _PIXELS_EDGE), mean=crops.mean, std=crops.std)
    return columns
