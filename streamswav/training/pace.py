"""Where a run is between its start and its end, and what that means for the next step."""

from __future__ import annotations

from dataclasses import dataclass

from streamswav.config import Config
from streamswav.errors import ConfigError
from streamswav.training.schedule import Schedule

WARMUP_SHARE = 0.1
FREEZE_SHARE = 0.01
QUEUE_SHARE = 0.075


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


def make_pace(config: Config, manifest_bytes: int) -> Pace:
    """Build the pace of a resolved configuration.

    Raises:
        ConfigError: amounts of images are given, but the number of samples is not known.
    """
    passes, batch = config.stream.passes, config.training.batch
    assert batch is not None
    in_bytes = config.stream.samples is None and config.training.images is None
    if in_bytes:
        _refuse_images(config)
        total = manifest_bytes * passes
    else:
        known = config.stream.samples * passes // batch * batch if config.stream.samples else 1 << 62
        total = min(known, config.training.images or known)
    optimizer, swav = config.optimizer, config.swav
    assert optimizer.rate is not None
    share = {"warmup": WARMUP_SHARE if batch > 256 else 0.0, "freeze": FREEZE_SHARE, "queue": QUEUE_SHARE}
    given = {
        "warmup": optimizer.warmup_images,
        "freeze": swav.freeze_prototypes_images,
        "queue": swav.queue_start_images,
    }
    amounts = {name: round(share[name] * total) if given[name] is None else given[name] for name in share}
    warmup, freeze, queue = amounts["warmup"] or 0, amounts["freeze"] or 0, amounts["queue"] or 0
    schedule = Schedule(
        base=optimizer.rate,
        start=optimizer.start_rate or 0.0,
        final=optimizer.final_rate or 0.0,
        warmup_images=warmup,
        total_images=total,
        batch=0 if in_bytes else batch,
        shape=optimizer.schedule or "cosine",
        cooldown_images=optimizer.cooldown_images,
    )
    return Pace(schedule, total, in_bytes, freeze, queue)


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
