"""Where a run is between its start and its end, and what that means for the next step."""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.config import Config
from streamswav.defaults import FREEZE, QUEUE_START, SMALL_BATCH, WARMUP, Portion
from streamswav.errors import ConfigError
from streamswav.training.schedule import Schedule


@dataclass(frozen=True)
class Stride:
    """How the next step is taken: its learning rate, and whether prototypes rest and the queue is used."""

    rate: float
    freeze_prototypes: bool
    use_queue: bool


@dataclass(frozen=True)
class Pace:
    """Progress in images where their number is known, else in bytes of the manifest.

    Attributes:
        schedule: of the rate, in this unit.
        total: images or bytes of the whole run.
        in_bytes: the unit is bytes.
        freeze_until: the prototypes rest until then, in this unit.
        queue_from: the queue is used from then on, in this unit.
    """

    schedule: Schedule
    total: int
    in_bytes: bool
    freeze_until: float
    queue_from: float

    def stride(self, images: int, sample_bytes: int) -> Stride:
        """Return how to take the step before which so much was trained."""
        done = sample_bytes if self.in_bytes else images
        return Stride(self.schedule.rate(done), done < self.freeze_until, done >= self.queue_from)

    def fraction(self, images: int, sample_bytes: int) -> float:
        """Return the share of the run that is done."""
        return min(1.0, (sample_bytes if self.in_bytes else images) / self.total)


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
    batch = config.training.batch
    assert batch is not None
    in_bytes = samples is None and config.training.images is None
    if in_bytes:
        _refuse_images(config)
        total = size
    else:
        known = 1 << 62 if samples is None else samples // batch * batch
        total = min(known, config.training.images or known)
    optimizer, swav = config.optimizer, config.swav
    assert optimizer.rate is not None
    each = bytes_per_image if in_bytes else 1

    def amount(given: int | None, portion: Portion) -> int:
        return portion.of(total, bytes_per_image=each) if given is None else given

    small = batch <= SMALL_BATCH and optimizer.warmup_images is None
    schedule = Schedule(
        base=optimizer.rate,
        start=optimizer.start_rate or 0.0,
        final=optimizer.final_rate or 0.0,
        warmup_images=0 if small else amount(optimizer.warmup_images, WARMUP),
        total_images=total,
        batch=0 if in_bytes else batch,
        shape=optimizer.schedule or "cosine",
        cooldown_images=optimizer.cooldown_images,
    )
    freeze = amount(swav.freeze_prototypes_images, FREEZE)
    return Pace(schedule, total, in_bytes, freeze, amount(swav.queue_start_images, QUEUE_START))


def _refuse_images(config: Config) -> None:
    given = {
        "optimizer.warmup_images": config.optimizer.warmup_images,
        "swav.freeze_prototypes_images": config.swav.freeze_prototypes_images,
        "swav.queue_start_images": config.swav.queue_start_images,
        "optimizer.cooldown_images": config.optimizer.cooldown_images,
    }
    for key, value in given.items():
        if value:
            reason = "counts images, but the shards do not say how many they hold; give stream.samples"
            raise ConfigError(key, reason, value=value)
