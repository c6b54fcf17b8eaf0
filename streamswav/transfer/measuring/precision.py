"""Average precision of multi-label classifiers: as scikit-learn has it, and with VOC07's eleven points.

Both come from the same curve. Images are ranked by score, those of equal score as one step. `mAP` sums, over
the steps, precision times the gain in recall (nothing is interpolated: scikit-learn's
`average_precision_score`). `mAP_11` is the mean, over the recalls 0, 0.1, ..., 1, of the best precision at
that recall or above (Everingham et al., The PASCAL visual object classes challenge, 2010, section 4.2).
A label of -1 takes the image out of that class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from streamswav.transfer.measuring.intervals import CONFIDENCE, Interval

BOOTSTRAP_SEED = 0

_RESAMPLES = 1000
_FEWEST = 200
_WORK = 2_000_000_000
_WEIGHTS_AT_ONCE = 1 << 22
_EXACT = torch.int32


@dataclass(frozen=True)
class MeanPrecision:
    """Mean average precision over the classes.

    Attributes:
        mean: of all points.
        mean_11: of VOC07's eleven.
        images: test images.
        classes: that have a positive test image; the mean is over them.
        without: classes that have none.
        intervals: by metric.
    """

    mean: float
    mean_11: float
    images: int
    classes: int
    without: int
    intervals: dict[str, Interval]

    @property
    def scores(self) -> dict[str, float]:
        """The means by metric."""
        return {"mAP": self.mean, "mAP_11": self.mean_11}


def measure_precision(scores: Tensor, labels: Tensor, *, seed: int = BOOTSTRAP_SEED) -> MeanPrecision:
    """Measure over all classes, with intervals from a bootstrap over the images.

    The images are drawn anew, with replacement, 1,000 times (200 at least where there are many classes and
    images); a class without a positive among those drawn is left out of that mean.

    Args:
        scores: float [N, C], on the CPU.
        labels: [N, C]: 1, 0, or -1 (not counted).
        seed: of the bootstrap.
    """
    images, classes = labels.shape
    resamples = max(_FEWEST, min(_RESAMPLES, _WORK // max(1, images * classes)))
    counts = _draw(images, resamples, seed)
    there = [number for number in range(classes) if (labels[:, number] > 0).any()]
    if not there:
        return MeanPrecision(0.0, 0.0, images, 0, classes, {})
    found = torch.stack([_of_class(scores[:, each], labels[:, each], counts) for each in there])
    means = found.nanmean(dim=0)  # [2, 1 + resamples], the first without drawing
    tail = (1 - CONFIDENCE) / 2
    ends = means[:, 1:].nanquantile(torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=1).T.tolist()
    intervals = {
        name: Interval(low, high, "bootstrap")
        for name, (low, high) in zip(("mAP", "mAP_11"), ends, strict=True)
    }
    whole, eleven = means[:, 0].tolist()
    return MeanPrecision(whole, eleven, images, len(there), classes - len(there), intervals)


def quick_mean(scores: Tensor, labels: Tensor) -> float:
    """Return the mean average precision by all points, without an interval; 0 without any positive."""
    each = [average_precision(*column)[0] for column in zip(scores.T, labels.T, strict=True)]
    there = [found for found in each if not math.isnan(found)]
    return fmean(there) if there else 0.0


def average_precision(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return average precision of scores [N] and labels [N] by all points and by eleven.

    NaN without a positive label.
    """
    plain = torch.ones(1, len(labels), dtype=torch.float64)
    whole, eleven = _of_class(scores, labels, plain[:0]).squeeze(1).tolist()
    return whole, eleven


def _draw(images: int, resamples: int, seed: int) -> Tensor:
    """Return how often each image is drawn, int16 [resamples, N]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(images, (images,), generator=generator) for _ in range(resamples))
    return torch.stack([torch.bincount(each, minlength=images).short() for each in drawn])


def _of_class(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return both precisions [2, 1 + R] of one class: as it is, then with each row of counts [R, N].

    Precision and recall are only needed at the positives: at the last image of equal score, P positives in
    the order of their scores.
    """
    counted = labels >= 0
    scores, positive = scores[counted].nan_to_num(nan=-torch.inf), labels[counted] > 0
    scores, order = scores.sort(descending=True, stable=True)
    where = positive[order].nonzero().squeeze(1)
    own = scores[where]
    ends = torch.searchsorted(-scores, -own, right=True) - 1  # [P], the last image of that score
    lasts = torch.searchsorted(-own, -own, right=True) - 1  # [P], the last positive of that score
    drawn = counts[:, counted.nonzero().squeeze(1)[order]]
    found = [_curves(torch.ones(1, len(scores)), where, ends, lasts)]
    for part in torch.split(drawn, max(1, _WEIGHTS_AT_ONCE // max(1, len(scores)))):
        found.append(_curves(part.to(_EXACT), where, ends, lasts))
    return torch.cat(found, dim=1)


def _curves(weights: Tensor, where: Tensor, ends: Tensor, lasts: Tensor) -> Tensor:
    """Return both precisions [2, R] of ranked images that count `weights` [R, n] times."""
    own = weights[:, where].double()
    if not len(where):
        return torch.full((2, len(weights)), torch.nan, dtype=torch.float64)
    taken = weights.cumsum(dim=1, dtype=_EXACT)[:, ends].double()
    right = own.cumsum(dim=1)[:, lasts]
    every = right[:, -1:]
    precision = right / taken.clamp(min=1)
    whole = (own * precision).sum(dim=1) / every.squeeze(1)  # NaN without a positive
    best = precision.flip(1).cummax(dim=1).values.flip(1)
    points = torch.linspace(0, 1, 11, dtype=torch.float64).expand(len(own), 11).contiguous()
    # A recall of 3/10 is not to miss the point 0.3 by its last bit.
    at = torch.searchsorted((right / every + 1e-12).contiguous(), points).clamp(max=len(where) - 1)
    eleven = best.gather(1, at).mean(dim=1).where(every.squeeze(1) > 0, torch.nan)
    return torch.stack([whole, eleven])
