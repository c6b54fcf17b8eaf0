"""Flip, colour jitter, grayscale, blur and normalisation of whole batches, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from streamswav.config import CropsSection
from streamswav.crops.blur import Blur
from streamswav.crops.colour import blend_, luma, shift_hue_
from streamswav.crops.parameters import ORDERS, Column

CPU_CHUNK_PIXELS = 1 << 19
"""On the CPU crops are worked on in chunks of this size, whose temporaries stay in cache."""

_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_ORDERS = torch.tensor(ORDERS)


class Augment:
    """Applies drawn parameters to the crops of one resolution (paper, appendix A.2)."""

    def __init__(self, section: CropsSection) -> None:
        self._mean, self._std = section.mean, section.std
        self._blur = Blur()

    @torch.no_grad()
    def __call__(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """Augment and normalise.

        Which crops an operation applies to is read from the parameters on the CPU, so nothing waits for
        the device as long as they are left there; only the figures it computes with are sent.

        Args:
            pixels: uint8 [n, B, S, S, 3], crop-major.
            parameters: float32 [n, B, len(Column)], best on the CPU.

        Returns:
            float32 [n * B, 3, S, S], crop-major, channels last in memory, on the device of `pixels`.
        """
        images = pixels.flatten(0, 1)
        rows = parameters.flatten(0, 1).cpu()
        augmented = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        with _full_precision(images.device):
            for part in _chunks(images):
                plan = _plan(rows[part]).to(images.device)
                self._augment(images[part], plan, out=augmented[part])
        return augmented.permute(0, 3, 1, 2)

    def _augment(self, pixels: Tensor, plan: _Plan, *, out: Tensor) -> None:
        either = torch.cat((pixels, pixels.flip(2))).index_select(0, plan.take)
        images = either.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        jittered = images[: len(plan.hue)]
        for (keep, grey, mean), hued in zip(plan.blends, plan.hued, strict=True):
            blend_(jittered, keep, grey, mean)
            shift_hue_(jittered[hued], plan.hue[hued])
        if len(plan.grayscale):
            grey = luma(images.index_select(0, plan.grayscale))
            images.index_copy_(0, plan.grayscale, grey.unsqueeze(1).expand(-1, 3, -1, -1))
        if len(plan.blurred):
            blurred = self._blur(images.index_select(0, plan.blurred), plan.sigma)
            images.index_copy_(0, plan.blurred, blurred)
        _standardise_(images, self._mean, self._std)
        torch.index_select(images.permute(0, 2, 3, 1).contiguous(), 0, plan.restore, out=out)


def normalise(pixels: Tensor, *, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Normalise without augmentation: (pixels / 255 - mean) / std.

    Args:
        pixels: uint8 [n, H, W, 3].
        mean: of each channel, for pixels of 0 to 1.
        std: of each channel, likewise.

    Returns:
        float32 [n, 3, H, W], channels last in memory, on the device of `pixels`.
    """
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    _standardise_(images, mean, std)
    return images


@dataclass(frozen=True)
class _Plan:
    """What happens to which crop. Crops are sorted by the place of the hue in their jitter's order.

    So at each of the jitter's four places the crops whose hue turns are one slice, the other three
    operations are blends that run over all jittered crops alike, and crops without jitter come last.
    """

    take: Tensor
    """int64 [n], sorts crops out of the batch followed by its mirror images."""
    restore: Tensor
    """int64 [n], undoes the sorting."""
    blends: Tensor
    """float32 [4, 3, jittered]: the three coefficients of `blend_` at each place."""
    hue: Tensor
    """float32 [jittered], in turns."""
    hued: tuple[slice, ...]
    """The crops whose hue turns at each of the four places."""
    grayscale: Tensor
    """int64: sorted crops that lose their colour."""
    blurred: Tensor
    """int64: sorted crops that are blurred."""
    sigma: Tensor
    """float32 [len(blurred)], in pixels."""

    def to(self, device: torch.device) -> _Plan:
        """Send the tensors on their way to the device, without waiting for it."""
        tensors = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if field.name != "hued"
        }
        return dataclasses.replace(self, **tensors)


def _plan(parameters: Tensor) -> _Plan:
    order = parameters[:, Column.ORDER].long()
    place = torch.where(order < 0, len(ORDERS[0]), (_ORDERS[order] == _HUE).long().argmax(dim=1))
    take = torch.argsort(place, stable=True)
    restore = torch.argsort(take)

    parameters = parameters[take]
    stops = torch.bincount(place, minlength=5).cumsum(0)[:4].tolist()
    jittered = parameters[: stops[-1]]
    blurred = parameters[:, Column.SIGMA].nonzero().flatten()
    return _Plan(
        take=take + len(take) * parameters[:, Column.FLIP].long(),
        restore=restore,
        blends=_blends(jittered),
        hue=jittered[:, Column.HUE],
        hued=tuple(slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)),
        grayscale=parameters[:, Column.GRAYSCALE].nonzero().flatten(),
        blurred=blurred,
        sigma=parameters[blurred, Column.SIGMA],
    )


def _blends(jittered: Tensor) -> Tensor:
    operation = _ORDERS[jittered[:, Column.ORDER].long()]
    keep = jittered[:, Column.BRIGHTNESS : Column.HUE + 1].gather(1, operation)
    keep[operation == _HUE] = 1
    rest = 1 - keep
    blends = torch.stack((keep, rest * (operation == _SATURATION), rest * (operation == _CONTRAST)))
    return blends.permute(2, 0, 1).contiguous()


def _chunks(images: Tensor) -> Iterator[slice]:
    n, height, width, _ = images.shape
    step = n if images.device.type != "cpu" else max(1, CPU_CHUNK_PIXELS // (height * width))
    return (slice(start, start + step) for start in range(0, n, step))


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Leave autocast, under which the products of the blur would be off by a level."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _standardise_(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """From 0..255 to the network's scale, a channel [n, 3, H, W] at a time: scalars need no transfer."""
    for channel, channel_mean, channel_std in zip(images.unbind(1), mean, std, strict=True):
        channel.sub_(255 * channel_mean).div_(255 * channel_std)
