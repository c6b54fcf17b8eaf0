"""What is known to help a run that learns nothing: configuration keys with values, in the order to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streamswav.config import Config
from streamswav.defaults import known

SMALL_EPSILON = 0.03
FREEZE_STEPS = 313
FEW_PROTOTYPES, MANY_PROTOTYPES = 64, 3000
SOFT_SCALE = 0.3
SOFT_JITTER = 0.4


@dataclass(frozen=True)
class Remedy:
    """A key of the configuration, a value to try, and why."""

    key: str
    value: object
    why: str

    def __str__(self) -> str:
        return f"{self.key} {self.value} ({self.why})"


@dataclass(frozen=True)
class Settings:
    """What of a resolved configuration the remedies depend on.

    Attributes:
        epsilon: of Sinkhorn.
        prototypes: K.
        embedding: D.
        batch: images a step.
        rate: the base rate.
        freeze_images: that the prototypes rest at the start; None: a share of the run.
        queue_length: over all ranks; 0: none.
        queue_images: from which on the queue is used; None: a share of the run.
        scales: of the crops, by resolution.
        jitter: strength of the colour jitter.
        head_batch_norm: whether the head has one.
        hard_codes: whether codes are rounded.
        precision: autocast type.
    """

    epsilon: float
    prototypes: int
    embedding: int
    batch: int
    rate: float
    freeze_images: int | None = None
    queue_length: int = 0
    queue_images: int | None = None
    scales: Sequence[tuple[float, float]] = ()
    jitter: float = 0.0
    head_batch_norm: bool = True
    hard_codes: bool = False
    precision: str = "float32"


def settings_of(config: Config) -> Settings:
    """Return what remedies depend on of a resolved configuration."""
    swav, crops = config.swav, config.crops
    return Settings(
        epsilon=known(swav.epsilon),
        prototypes=known(swav.prototypes),
        embedding=config.model.embedding,
        batch=known(config.training.batch),
        rate=known(config.optimizer.rate),
        freeze_images=swav.freeze_prototypes_images,
        queue_length=known(swav.queue_length),
        queue_images=swav.queue_start_images,
        scales=crops.scales,
        jitter=crops.jitter * max(crops.brightness, crops.contrast, crops.saturation),
        head_batch_norm=config.model.head_batch_norm,
        hard_codes=swav.hard_codes,
        precision=config.training.precision,
    )


def remedies_for(verdict: str, settings: Settings, readings: Mapping[str, float]) -> tuple[Remedy, ...]:
    """Return what to try against a verdict, first things first.

    The order is that of the method's authors and users; what the run has already is left out.
    """
    queued = "queue_staleness_ratio" in readings
    found = [
        make(settings) for make in _ORDER[verdict] if queued or make not in (_later_queue, _smaller_queue)
    ]
    return tuple(each for each in found if each is not None)


Make = Callable[[Settings], Remedy | None]


def _smaller_epsilon(settings: Settings) -> Remedy | None:
    if settings.epsilon <= SMALL_EPSILON:
        return None
    return Remedy("swav.epsilon", SMALL_EPSILON, f"sharper codes than with {settings.epsilon:g}")


def _larger_epsilon(settings: Settings) -> Remedy | None:
    if settings.epsilon >= 0.05:
        return None
    return Remedy("swav.epsilon", 0.05, f"softer codes than with {settings.epsilon:g}")


def _longer_freeze(settings: Settings) -> Remedy:
    least = FREEZE_STEPS * settings.batch
    images = max(2 * (settings.freeze_images or 0), least)
    return Remedy("swav.freeze_prototypes_images", images, "embeddings spread before the prototypes move")


def _lower_rate(settings: Settings) -> Remedy:
    return Remedy("optimizer.rate", float(f"{settings.rate / 2:.3g}"), f"half of {settings.rate:g}")


def _softer_crops(settings: Settings) -> Remedy | None:
    if all(low >= SOFT_SCALE for low, _ in settings.scales[:1]):
        return None
    scales = [[SOFT_SCALE, 1.0], *([0.1, SOFT_SCALE] for _ in settings.scales[1:])]
    return Remedy("crops.scales", scales, "crops that show more of the image")


def _softer_jitter(settings: Settings) -> Remedy | None:
    if settings.jitter <= SOFT_JITTER:
        return None
    return Remedy("crops.jitter", SOFT_JITTER, "fewer images of other colours")


def _fewer_prototypes(settings: Settings) -> Remedy | None:
    if settings.prototypes <= 2 * FEW_PROTOTYPES:
        return None
    return Remedy(
        "swav.prototypes", settings.prototypes // 2, "about ten times the classes expected; a new run"
    )


def _more_prototypes(settings: Settings) -> Remedy | None:
    if settings.prototypes > FEW_PROTOTYPES:
        return None
    return Remedy("swav.prototypes", 300, f"{settings.prototypes} are too few; a new run")


def _later_queue(settings: Settings) -> Remedy:
    images = max(2 * (settings.queue_images or 0), FREEZE_STEPS * settings.batch)
    return Remedy("swav.queue_start_images", images, "not before the embeddings have settled")


def _smaller_queue(settings: Settings) -> Remedy:
    half = settings.queue_length // 2 // settings.batch * settings.batch
    return Remedy("swav.queue_length", half, "younger embeddings; 0 is none; a new run")


def _hard_codes(settings: Settings) -> Remedy | None:
    return None if settings.hard_codes else Remedy("swav.hard_codes", True, "for the first steps, then off")


def _no_batch_norm(settings: Settings) -> Remedy | None:
    return Remedy("model.head_batch_norm", False, "a new run") if settings.head_batch_norm else None


def _float32(settings: Settings) -> Remedy | None:
    return None if settings.precision == "float32" else Remedy("training.precision", "float32", "no overflow")


_ORDER: Mapping[str, Sequence[Make]] = {
    "diverging": (_more_prototypes, _lower_rate, _longer_freeze, _larger_epsilon, _float32),
    "queue_rebound": (_later_queue, _smaller_queue, _lower_rate),
    "stuck": (
        _smaller_epsilon,
        _later_queue,
        _longer_freeze,
        _softer_crops,
        _softer_jitter,
        _lower_rate,
        _fewer_prototypes,
        _no_batch_norm,
        _hard_codes,
    ),
    "dimensional_collapse": (_more_prototypes, _smaller_epsilon, _softer_crops, _softer_jitter, _lower_rate),
    "prototype_collapse": (_smaller_epsilon, _longer_freeze, _lower_rate, _later_queue, _fewer_prototypes),
}
