"""Where a run is between its start and its end, and what that means for the next step."""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.config import Config
from streamswav.defaults import SMALL_BATCH, WARMUP, Portion
from streamswav.errors import ConfigError
from streamswav.training.schedule import Schedule


@dataclass(frozen=True)
class Stride:
    """How the next step is taken.

    Attributes:
        rate: learning rate.
        images: that were trained before it, over all ranks.
        done: what was trained before it, in the unit of the run's pace.
    """

    rate: float
    images: int
    done: int


@dataclass(frozen=True)
class Pace:
    """Progress in images where their number is known, else in bytes of the manifest.

    Attributes:
        schedule: of the rate, in this unit.
        total: images or bytes of the whole run.
        in_bytes: the unit is bytes.
        bytes_per_image: estimate of a sample's mean size, where the unit is bytes; None: not known.
    """

    schedule: Schedule
    total: int
    in_bytes: bool
    bytes_per_image: float | None = None

    def stride(self, images: int, sample_bytes: int) -> Stride:
        """Return how to take the step before which so much was trained."""
        done = sample_bytes if self.in_bytes else images
        return Stride(self.schedule.rate(done), images, done)

    def fraction(self, images: int, sample_bytes: int) -> float:
        """Return the share of the run that is done."""
        return min(1.0, (sample_bytes if self.in_bytes else images) / self.total)

    def amount(self, given: int | None, portion: Portion) -> int:
        """Return what is configured, else a portion of the run, in the unit."""
        each = self.bytes_per_image if self.in_bytes else 1
        return portion.of(self.total, bytes_per_image=each) if given is None else given

    def refuse_images(self, key: str, value: int | None) -> None:
        """Refuse an amount of images where nobody knows how many there are.

        Raises:
            ConfigError: the unit is bytes.
        """
        if self.in_bytes and value:
            _refuse_images(key, value)


def make_pace(
    config: Config, *, samples: int | None, size: int, bytes_per_image: float | None = None
) -> Pace:
    """Build the pace of a resolved configuration.

    Args:
        config: with batch and rate chosen.
        samples: of all passes, where that is known.
        size: bytes of the shards of all passes.
        bytes_per_image: estimate of a sample's mean size, by which the bounds of warm-up, freeze and queue
            start, which are images, hold in bytes too; None: not known, and their shares are not bounded.

    Raises:
        ConfigError: amounts of images are given, but the number of samples is not known.
    """
    batch, optimizer = config.training.batch, config.optimizer
    assert batch is not None
    assert optimizer.rate is not None
    in_bytes = samples is None and config.training.images is None
    if in_bytes:
        _refuse_images("optimizer.warmup_images", optimizer.warmup_images)
        _refuse_images("optimizer.cooldown_images", optimizer.cooldown_images)
        total = size
    else:
        known = 1 << 62 if samples is None else samples // batch * batch
        total = min(known, config.training.images or known)
    warmup = optimizer.warmup_images
    if warmup is None:
        each = bytes_per_image if in_bytes else 1
        warmup = 0 if batch <= SMALL_BATCH else WARMUP.of(total, bytes_per_image=each)
    schedule = Schedule(
        base=optimizer.rate,
        start=optimizer.start_rate or 0.0,
        final=optimizer.final_rate or 0.0,
        warmup_images=warmup,
        total_images=total,
        batch=0 if in_bytes else batch,
        shape=optimizer.schedule or "cosine",
        cooldown_images=optimizer.cooldown_images,
        milestones=optimizer.milestones,
        factor=optimizer.factor,
    )
    return Pace(schedule, total, in_bytes, bytes_per_image)


def _refuse_images(key: str, value: int | None) -> None:
    if value:
        reason = "counts images, but the shards do not say how many they hold; give stream.samples"
        raise ConfigError(key, reason, value=value)
