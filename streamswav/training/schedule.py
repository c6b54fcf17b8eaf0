"""The learning rate as a function of the images seen: a stream has no epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamswav.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine, a constant rate with a cool-down, or steps (paper, appendix A).

    All amounts have one unit, images as a rule. Where the images of a run are not known, its bytes
    are: give every amount and every position in bytes, and `batch` as 0.

    Attributes:
        base: rate after the warm-up.
        start: rate of the first step of the warm-up.
        final: rate that the cosine or the cool-down ends at.
        warmup_images: length of the warm-up; its last step has the base rate already.
        total_images: length of the run; None where it has no end, which a cosine needs.
        batch: images a step; with 0 the base rate is reached where the warm-up ends, not a step earlier.
        shape: what follows the warm-up.
        cooldown_images: with a constant rate, the last images, over which it falls linearly to `final`.
        milestones: with steps, the shares of the run at which the rate is multiplied by `factor`.
        factor: with steps.

    Raises:
        ConfigError: a cosine or a cool-down without an end.
    """

    base: float
    start: float = 0.0
    final: float = 0.0
    warmup_images: int = 0
    total_images: int | None = None
    batch: int = 0
    shape: Literal["cosine", "constant", "step"] = "cosine"
    cooldown_images: int = 0
    milestones: Sequence[float] = ()
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.total_images is None and self.shape != "constant":
            raise ConfigError("optimizer.schedule", "needs the length of the run", value=self.shape)
        if self.total_images is None and self.cooldown_images:
            reason = "needs the length of the run"
            raise ConfigError("optimizer.cooldown_images", reason, value=self.cooldown_images)

    def rate(self, images: int) -> float:
        """Return the rate of the step before which `images` were seen."""
        if images < self.warmup_images:
            return self._warmup(images)
        if self.total_images is None:
            return self.base
        if self.shape == "cosine":
            return self.rate_at(_share(images - self.warmup_images, self.total_images - self.warmup_images))
        if self.shape == "step":
            passed = sum(images >= round(share * self.total_images) for share in self.milestones)
            return self.base * self.factor**passed
        cooled = _share(images - (self.total_images - self.cooldown_images), self.cooldown_images)
        return self.base + (self.final - self.base) * cooled

    def rate_at(self, progress: float) -> float:
        """Return the cosine's rate at a share, 0 to 1, of what follows the warm-up."""
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))

    def _warmup(self, images: int) -> float:
        # The published warm-up includes its end: n steps rise in n - 1 equal parts.
        last = self.warmup_images
        if self.batch:
            last = (math.ceil(self.warmup_images / self.batch) - 1) * self.batch
        return self.start + (self.base - self.start) * (_share(images, last) if last else 0.0)


def _share(part: int, whole: int) -> float:
    """Part over whole within 0 to 1; of nothing, everything is done once it has begun."""
    if whole <= 0:
        return float(part >= 0)
    return min(max(part / whole, 0.0), 1.0)
