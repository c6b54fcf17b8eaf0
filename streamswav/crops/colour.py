"""Colour operations on batches of planar images, in place, with one parameter an image.

Images are float32 [n, 3, H, W] in 0 to 255. The definitions are those of torchvision's functional
operations on tensors, which follow Pillow's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def luma(images: Tensor) -> Tensor:
    """Return the ITU-R 601 luma of images [n, 3, H, W] as [n, H, W]."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blend_(images: Tensor, keep: Tensor, grey: Tensor, mean: Tensor) -> None:
    """Replace images by `keep * images + grey * luma + mean * average luma`, clamped to 0..255.

    With f the factor and 1 - f the rest, brightness is (f, 0, 0), saturation (f, rest, 0), contrast
    (f, 0, rest), and an image that is to stay as it is has (1, 0, 0): so one pass over the whole batch
    serves images that want different operations.

    Args:
        images: float32 [n, 3, H, W], changed in place.
        keep: float32 [n], and so are the other two.
        grey: share of the pixel's own luma.
        mean: share of the image's average luma.
    """
    target = luma(images)
    average = target.mean((1, 2)).mul_(mean)
    target.mul_(grey.view(-1, 1, 1)).add_(average.view(-1, 1, 1))
    images.mul_(keep.view(-1, 1, 1, 1)).add_(target.unsqueeze(1)).clamp_(0, 255)


def shift_hue_(images: Tensor, shift: Tensor) -> None:
    """Turn the hue in the HSV hexcone; saturation and value stay.

    Arithmetic on masks stands in for selection, which costs branches on CPUs: `lerp` with a weight of 0
    or 1 is exact. Where two channels share the maximum both formulas agree, so the order is free.

    Args:
        images: float32 [n, 3, H, W], changed in place.
        shift: float32 [n], in turns.
    """
    red, green, blue = images.unbind(1)
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = high - low
    inverse = chroma.clamp(min=1e-6).reciprocal_()

    mask = torch.empty_like(high)
    hue = (red - green).mul_(inverse).add_(4)
    other = (blue - red).mul_(inverse).add_(2)
    hue.lerp_(other, mask.copy_(high).eq_(green))
    torch.sub(green, blue, out=other).mul_(inverse)
    hue.lerp_(other, mask.copy_(high).eq_(red))

    hue.add_(6 * shift.view(-1, 1, 1))
    torch.div(hue, 6, out=other).floor_()
    hue.sub_(other, alpha=6)

    torch.sub(hue, 3, out=other).abs_().sub_(1).clamp_(0, 1)
    torch.addcmul(low, other, chroma, out=red)
    for channel, centre in ((green, 2), (blue, 4)):
        torch.sub(hue, centre, out=other).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(low, other, chroma, out=channel)
