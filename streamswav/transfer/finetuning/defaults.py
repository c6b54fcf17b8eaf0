"""What finetuning chooses where the user did not: each value with its reason, as `defaults` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamswav.config import Config
from streamswav.defaults import Choice, Facts, known

BATCH = 256
TINY_SAMPLES = 1000
"""Up to so many images a pass takes about as long as it takes to start loader processes for it."""

_FROZEN_RATES = [0.3, 0.1, 0.03, 1.0]
_FROZEN_DECAYS = [1e-6]
_FULL_RATE, _FULL_HEAD_RATE, _SCRATCH_RATE = 0.01, 0.2, 0.1

Rule = Callable[[], tuple[Any, str]]


def complete(config: Config, begun: Config | None, rules: Mapping[str, Rule]) -> tuple[Config, list[Choice]]:
    """Fill in the keys that were not given; what a run once chose stays.

    Args:
        config: with what was given in its sections' `model_fields_set`.
        begun: complete configuration of the run that is continued.
        rules: by key; each returns a value and its reason.
    """
    chosen: list[Choice] = []
    changed: dict[str, dict[str, Any]] = {}
    for key, rule in rules.items():
        name, field = key.split(".")
        section = getattr(config, name)
        value = getattr(section, field)
        if value not in (None, []) and field in section.model_fields_set:
            continue
        if begun is not None:
            choice = Choice(key, getattr(getattr(begun, name), field), "as the run began")
        else:
            choice = Choice(key, *rule())
        chosen.append(choice)
        changed.setdefault(name, {})[field] = choice.value
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changed.items()}
    return config.model_copy(update=sections), chosen


def rules_of_trunk(source: Config | None) -> dict[str, Rule]:
    """Return the rules for what a trunk fixes, or was trained with.

    Args:
        source: of the run that the trunk comes from, or what stands for it; None: it begins at random.
    """
    if source is None:
        return {}
    model, crops = source.model, source.crops
    rules = {
        f"model.{field}": _as_it_is(getattr(model, field), "the trunk's of model.init")
        for field in ("trunk", "width", "stem")
    }
    for field in ("mean", "std"):
        rules[f"crops.{field}"] = _as_it_is(getattr(crops, field), "as model.init was trained")
    rules["crops.sizes"] = _as_it_is(crops.sizes[:1], "the large crops that model.init was trained on")
    return rules


def rules_of_training(config: Config, facts: Facts) -> dict[str, Rule]:
    """Return the rules for batch, rates and the like."""
    section, scratch = config.finetune, not config.model.init
    frozen, samples = section.mode == "frozen", facts.samples

    def batch() -> tuple[int, str]:
        if samples is None or samples >= 4 * BATCH:
            return _shared(BATCH, facts.world_size), "the paper's for every kind of finetuning"
        fitting = max(1, min(BATCH, samples // 4))
        return _shared(fitting, facts.world_size), f"four steps a pass over {samples} images"

    size = config.training.batch or (facts.begun.training.batch if facts.begun else None) or batch()[0]

    def rate() -> tuple[float, str]:
        if frozen:
            first = (section.rates or [_FROZEN_RATES[0] * size / BATCH])[0]
            return first, "the first head's: the trunk has none"
        if scratch:
            return _SCRATCH_RATE * size / BATCH, "0.1 at batch 256, linear in the batch: from scratch"
        return _FULL_RATE * size / BATCH, "0.01 at batch 256, linear in the batch: the paper's trunk at 10%"

    base = config.optimizer.rate or (facts.begun.optimizer.rate if facts.begun else None) or rate()[0]

    def rates() -> tuple[list[float], str]:
        if frozen:
            scaled = [each * size / BATCH for each in _FROZEN_RATES]
            return scaled, "the paper's 0.3 at batch 256 first, the others beside it"
        if scratch:
            return [base], "the trunk's: both begin at random"
        ratio = _FULL_HEAD_RATE / _FULL_RATE
        return [base * ratio], "20 times the trunk's, as the paper at 10%: the head is new"

    def weight_decay() -> tuple[float, str]:
        return (1e-6, "the paper's linear protocol") if frozen else (1e-4, "usual for supervised training")

    decay = (
        config.optimizer.weight_decay if _given(config, "optimizer", "weight_decay") else weight_decay()[0]
    )
    return {
        "training.batch": batch,
        "loader.workers": lambda: _workers(samples),
        "optimizer.rate": rate,
        "optimizer.weight_decay": weight_decay,
        "finetune.rates": rates,
        "finetune.weight_decays": lambda: ([decay], "as optimizer.weight_decay"),
        "optimizer.final_rate": _as_it_is(0.0, "the cosine's end in the paper's transfers"),
        "optimizer.start_rate": _as_it_is(0.0, "of a warm-up, if there is one"),
        "optimizer.warmup_images": _as_it_is(0, "none, as the paper"),
        "optimizer.schedule": _as_it_is("cosine", "the run has an end"),
    }


def rules_that_hold(config: Config, facts: Facts) -> dict[str, Rule]:
    """Return the rules but for those whose choice is left to the general defaults."""
    rules = rules_of_training(config, facts)
    if facts.samples is None or facts.samples > TINY_SAMPLES:
        del rules["loader.workers"]
    return rules


def _workers(samples: int | None) -> tuple[int, str]:
    return 0, f"a pass over {known(samples)} images is shorter than starting processes for it"


def _shared(batch: int, world_size: int) -> int:
    return max(1, batch // world_size) * world_size


def _given(config: Config, section: str, field: str) -> bool:
    return field in getattr(config, section).model_fields_set


def _as_it_is(value: Any, reason: str) -> Rule:
    return lambda: (value, reason)
