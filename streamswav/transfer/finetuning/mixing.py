"""Mixup and cutmix: what is drawn for a step depends on seed, images seen and rank alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from streamswav.philox import permutation, words


class Mixing:
    """Mixes the images of a rank's batch in pairs, with one share for the step.

    Mixup (Zhang et al., 2018) adds up the images of a pair; cutmix (Yun et al., 2019) puts a box of the one
    into the other. The targets are shares of classes. Where both are asked for, a coin decides.

    Args:
        mixup: a and b of the beta distribution that the share comes from; 0: no mixup.
        cutmix: likewise.
        seed: of the run.
        rank: of this process; each has partners of its own, within its share of the batch.
    """

    def __init__(self, *, mixup: float, cutmix: float, seed: int, rank: int = 0) -> None:
        self._alphas, self._seed, self._rank = (mixup, cutmix), seed, rank

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return any(self._alphas)

    def __call__(self, images: Tensor, targets: Tensor, *, seen: int) -> tuple[Tensor, Tensor]:
        """Mix.

        Args:
            images: [B, 3, S, S].
            targets: shares of classes [B, C].
            seen: images that were trained before this step.

        Returns:
            Images and targets of the same shapes.
        """
        draws = np.random.Generator(_bits(self._seed, seen))
        cut = bool(draws.random() < 0.5) if all(self._alphas) else bool(self._alphas[1])
        share = float(draws.beta(self._alphas[cut], self._alphas[cut]))
        height, width = images.shape[-2:]
        box = _box(share, (height, width), (draws.random(), draws.random())) if cut else None
        order = permutation(len(images), "mixing", self._seed, seen, self._rank)
        partners = torch.tensor(order).to(images.device, non_blocking=True)
        if box is None:
            mixed = images * share + images.index_select(0, partners) * (1 - share)
        else:
            top, bottom, left, right = box
            mixed = images.clone()
            inside = images[:, :, top:bottom, left:right].index_select(0, partners)
            mixed[:, :, top:bottom, left:right] = inside
            share = 1 - (bottom - top) * (right - left) / (height * width)
        return mixed, targets * share + targets.index_select(0, partners) * (1 - share)


def _bits(seed: int, seen: int) -> np.random.Philox:
    return np.random.Philox(key=int(words(1, "mixing", seed, seen)[0]))


def _box(share: float, size: tuple[int, int], centre: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of a box of 1 - share of the area, cut at the image's edges."""
    edges: list[int] = []
    for length, middle in zip(size, centre, strict=True):
        half = round(length * math.sqrt(1 - share)) // 2
        at = int(middle * length)
        edges += [max(0, at - half), min(length, at + half)]
    return edges[0], edges[1], edges[2], edges[3]
