"""No crops, to measure the stream alone. Apart: loader processes import this module, and little with it."""

from __future__ import annotations

import torch

from streamswav.crops import Crops, MultiCrop


class Undecoded(MultiCrop):
    """Makes nothing of an image."""

    def __call__(self, image: bytes, *, key: tuple[int, ...]) -> Crops:  # noqa: ARG002
        """Return no crops."""
        return Crops((), torch.zeros(0, 0))
