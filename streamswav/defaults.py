"""What is chosen when the user did not: a rule for each value, with its reason, on facts found at start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from streamswav.config import Config, check_combinations, keys
from streamswav.errors import ConfigError

PAPER_BATCH = 4096
_MEMORY_OF_THE_PAPER = {1: 64, 2: 32, 4: 32, 5: 8}
_LARGE_TRUNK = 100_000_000
_RANKS_IN_GROUPS = 16
_DIVISORS_OF_12 = (12, 6, 4, 3, 2, 1)
_OF_THE_RUN = ("stream", "swav", "optimizer")
_STANDING = {
    "stream.window": "about 13 MB of photographs to read again when a lane resumes",
    "stream.skip_ratio": "uncurated data is dirty; losing a tenth of it is a mistake upstream",
    "crops.sizes": "the paper's",
    "crops.counts": "the paper's",
    "crops.scales": "the paper's",
    "checkpoint.minutes": "so much is lost at most when a node fails; writing goes on beside the steps",
    "checkpoint.keep": "one to go on from, one should it be damaged, one to look back at",
}
"""Defaults that no fact changes, and why they are what they are."""


FINETUNE_BASE: Mapping[str, Mapping[str, Any]] = {
    "run": {"task": "finetune"},
    "stream": {"passes": 20},
    "crops": {
        "sizes": [224],
        "counts": [1],
        "scales": [(0.08, 1.0)],
        "jitter": 0.0,
        "grayscale": 0.0,
        "blur": 0.0,
    },
    "optimizer": {"name": "sgd"},
}
"""Finetuning's own defaults, beneath file, environment and arguments (paper, appendix A)."""


@dataclass(frozen=True)
class Portion:
    """A share of the run, up to a number of images.

    Attributes:
        share: 0 to 1.
        most: images that it never exceeds.
    """

    share: float
    most: int

    def of(self, total: int, *, bytes_per_image: float | None = 1) -> int:
        """Return the portion of `total`, in its unit.

        Args:
            total: images or bytes of the whole run.
            bytes_per_image: 1 where `total` counts images; None: not known, and nothing bounds the share.
        """
        amount = round(self.share * total)
        return amount if bytes_per_image is None else min(amount, round(self.most * bytes_per_image))


WARMUP = Portion(0.1, 12_800_000)
FREEZE = Portion(0.01, 1_281_167)
QUEUE_START = Portion(0.075, 19_200_000)
SMALL_BATCH = 256
"""Up to this batch there is no warm-up, as in the paper."""


@dataclass(frozen=True)
class Facts:
    """What is known before a run starts.

    Attributes:
        world_size: ranks.
        cores: CPU cores a rank can use.
        cuda: whether the model lives on a GPU.
        bfloat16: whether that GPU has it.
        shards: in the manifest.
        samples: in one pass, where the producers counted; else None.
        run_samples: in all passes, where they counted; else None.
        trunk_parameters: their number.
        images_that_fit: a rank's, of which a step fills 80% of a GPU's memory at most; None: not known.
        begun: the complete configuration of the run that is continued; else None.
    """

    world_size: int
    cores: int
    cuda: bool
    bfloat16: bool
    shards: int
    samples: int | None
    trunk_parameters: int
    run_samples: int | None = None
    images_that_fit: int | None = None
    begun: Config | None = None


@dataclass(frozen=True)
class Choice:
    """A value that a rule chose."""

    key: str
    value: Any
    reason: str


Number = TypeVar("Number", int, float)


def known(value: Number | None) -> Number:
    """Return a value that `resolve` has filled in."""
    assert value is not None, "resolved at start"
    return value


def resolve(config: Config, facts: Facts) -> tuple[Config, list[Choice]]:
    """Fill in everything that was left open.

    What a run once chose stays, although its rule would choose otherwise on other machines.

    Returns:
        The complete configuration, and what was chosen with reasons, in order. Amounts of images stay
        None where the number of samples is not known: they are then shares of the manifest's bytes.

    Raises:
        ConfigError: the given values and the facts do not fit together.
    """
    standing = _standing(config)
    config, kept = _as_begun(config, facts.begun)
    chosen = standing + kept
    values = config.model_dump()

    def choose(key: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        section, name = key.split(".")
        if values[section][name] is None:
            value, reason = rule()
            values[section][name] = value
            chosen.append(Choice(key, value, reason))
        return values[section][name]

    if config.stream.samples is None and facts.samples is not None:
        choose("stream.samples", lambda: (facts.samples, "counted by the shards' producer (_stats.json)"))
    samples = values["stream"]["samples"]
    distinct = min(samples, config.training.images or samples) if samples else None
    whole = run_samples(Config.model_validate(values), facts.run_samples)
    total = min(whole, config.training.images or whole) if whole else None
    batch = choose("training.batch", lambda: _batch(config, facts))
    if facts.begun is None:  # else what is left is dealt again, for these ranks
        _check_batch(batch, facts.world_size)
    _check_micro_batches(config, batch // facts.world_size)
    _choose_grid(choose, config, facts, batch)
    if config.run.task == "pretrain":
        _choose_objective(choose, facts, batch, distinct=distinct, total=total)
    _choose_rate(choose, config, batch, total)
    _check_batch_norm(config, facts)
    choose("training.sync_batch_norm", lambda: _sync_batch_norm(config, facts))
    if total is not None:
        often = max(1, total // 20)
        choose("checkpoint.keep_every_images", lambda: (often, "one in 5% of the run is kept for good"))
    if config.training.precision == "auto":
        values["training"]["precision"] = None
        choose("training.precision", lambda: _precision(facts))
    resolved = Config.model_validate(values)
    check_combinations(resolved)
    return resolved, chosen


def run_samples(config: Config, counted: int | None) -> int | None:
    """Return the samples of all passes, where that is known.

    Args:
        config: its `stream.samples`, of one pass, hold where all URLs have as many passes.
        counted: by the producers, for all passes.
    """
    stream = config.stream
    if stream.samples and len(set(stream.passes_by_url)) <= 1:
        return stream.samples * stream.turns
    return counted


def _standing(config: Config) -> list[Choice]:
    found = []
    for key, reason in _STANDING.items():
        name, field = key.split(".")
        section = getattr(config, name)
        if field not in section.model_fields_set and getattr(section, field) == _plain(section, field):
            found.append(Choice(key, getattr(section, field), reason))
    return found


def _plain(section: BaseModel, field: str) -> object:
    """Return the default of a key; a command may have one of its own."""
    return type(section).model_fields[field].default


def chosen_keys() -> set[str]:
    """Return the keys that a run chooses where they are left open."""
    facts = Facts(
        world_size=1, cores=8, cuda=False, bfloat16=False, shards=1000, samples=10**8, trunk_parameters=0
    )
    return {choice.key for choice in resolve(Config(), facts)[1]}


def _as_begun(config: Config, begun: Config | None) -> tuple[Config, list[Choice]]:
    """Take over what defines the order and the objective of the run that is continued."""
    values = config.model_dump()
    before = begun.model_dump() if begun else {}
    kept = []
    for key in keys():
        section, name = key.split(".")
        if section in _OF_THE_RUN or key == "training.batch":
            value = before.get(section, {}).get(name)
            if values[section][name] is None and value is not None:
                values[section][name] = value
                kept.append(Choice(key, value, "as the run began"))
    return Config.model_validate(values), kept


Choose = Callable[[str, Callable[[], tuple[Any, str]]], Any]


def _check_batch(batch: int, world_size: int) -> None:
    if batch % world_size:
        raise ConfigError("training.batch", f"must be a multiple of the {world_size} ranks", value=batch)


def _check_micro_batches(config: Config, share: int) -> None:
    pieces = config.training.micro_batches
    if pieces > max(1, share):
        reason = f"a rank has only {share} images of a batch"
        raise ConfigError("training.micro_batches", reason, value=pieces)


def _check_batch_norm(config: Config, facts: Facts) -> None:
    share, world_size = config.training.sync_batch_norm, facts.world_size
    if share and share < world_size and world_size % share:
        reason = f"the {world_size} ranks do not fall into groups of this size; 0 means all of them"
        raise ConfigError("training.sync_batch_norm", reason, value=share)


def _choose_grid(choose: Choose, config: Config, facts: Facts, batch: int) -> None:
    rows = config.stream.rows
    workers = choose("loader.workers", lambda: _workers(facts, rows))
    columns = config.stream.columns or _columns(facts, batch)
    if rows is None:
        rows = _fit_rows(facts, workers, columns)
        choose("stream.rows", lambda: (rows, "room to change the workers; about 4 shards a lane or more"))
    assert rows is not None
    if facts.begun is None and workers and rows % workers:
        raise ConfigError("stream.rows", f"must be a multiple of loader.workers ({workers})", value=rows)
    fitted = config.stream.columns or _fit_columns(facts, columns, rows)
    choose("stream.columns", lambda: (fitted, "room to halve and double the ranks; divides training.batch"))


def _choose_objective(
    choose: Choose, facts: Facts, batch: int, *, distinct: int | None, total: int | None
) -> None:
    large = facts.trunk_parameters > _LARGE_TRUNK
    choose("swav.prototypes", lambda: _prototypes(large, distinct))
    choose("swav.epsilon", lambda: (0.03, "SEER's, for large trunks") if large else (0.05, "the paper's"))
    choose("swav.iterations", lambda: (10, "SEER's, for large trunks") if large else (3, "the paper's"))
    length = choose("swav.queue_length", lambda: _queue_length(batch))
    if length == 0:
        choose("swav.queue_start_images", lambda: (0, "there is no queue"))
    elif batch >= 1536:
        choose("swav.queue_start_images", lambda: (0, "from the start, as the paper at 1536 and 2560"))
    elif total is not None:
        start = QUEUE_START.of(total)
        choose("swav.queue_start_images", lambda: (start, "7.5% of the images: the paper's epoch 15 of 200"))
    if total is not None:
        freeze = FREEZE.of(total)
        choose(
            "swav.freeze_prototypes_images", lambda: (freeze, "1% of the images, one ImageNet epoch at most")
        )


def _choose_rate(choose: Choose, config: Config, batch: int, total: int | None) -> None:
    rate = choose("optimizer.rate", lambda: _rate(config.optimizer.name, batch))
    choose("optimizer.final_rate", lambda: (rate / 1000, "a thousandth of the base rate, as the paper"))
    choose("optimizer.schedule", lambda: _schedule(config))
    if total is not None:
        choose("optimizer.warmup_images", lambda: _warmup(batch, total))
    choose("optimizer.start_rate", lambda: (rate / 16, "a sixteenth of the base rate, as the paper"))


def _schedule(config: Config) -> tuple[str, str]:
    if config.stream.follow and not config.training.images:
        return "constant", "a followed stream has no end to anneal to; `streamswav cooldown` ends it"
    return "cosine", "the manifest has an end"


def _batch(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.images_that_fit is not None:
        batch = min(PAPER_BATCH // facts.world_size, facts.images_that_fit) * facts.world_size
        return batch, f"{batch // facts.world_size} a rank: within 80% of the GPU's memory, 4096 at most"
    widths = [width for width in _MEMORY_OF_THE_PAPER if width <= max(1.0, config.model.width)]
    each = _MEMORY_OF_THE_PAPER[widths[-1]]
    batch = min(PAPER_BATCH // facts.world_size, each) * facts.world_size
    return batch, f"{batch // facts.world_size} a rank, about the paper's for this width"


def _workers(facts: Facts, rows: int | None) -> tuple[int, str]:
    fitting = (n for n in _DIVISORS_OF_12 if n <= max(1, facts.cores) and (rows or 12) % n == 0)
    return next(fitting, 1), f"{facts.cores} cores a rank; a divisor of the grid's rows"


def _columns(facts: Facts, batch: int) -> int:
    """The smallest ranks x 2^k that is 64 and 4 x ranks at least and divides the batch, else the largest."""
    columns = facts.world_size
    while columns < max(4 * facts.world_size, 64) and batch % (2 * columns) == 0:
        columns *= 2
    return columns


def _fit_rows(facts: Facts, workers: int, columns: int) -> int:
    for rows in _DIVISORS_OF_12:
        if rows % max(1, workers) == 0 and rows * columns * 4 <= facts.shards:
            return rows
    return max(1, workers)


def _fit_columns(facts: Facts, columns: int, rows: int) -> int:
    while columns > facts.world_size and columns * rows * 4 > facts.shards:
        columns //= 2
    return columns


def _prototypes(large: bool, distinct: int | None) -> tuple[int, str]:
    if large:
        return 16_000, "SEER's, for large trunks"
    if distinct is not None and distinct < 1_000_000:
        return 512, "under a million images: fewer prototypes, so that each gets its share"
    return 3000, "the paper's"


def _queue_length(batch: int) -> tuple[int, str]:
    if batch >= PAPER_BATCH:
        return 0, "the batch is large enough without"
    if batch >= 1536:
        return batch, "one batch, as the paper at 1536 and 2560"
    return (PAPER_BATCH - batch) // batch * batch, "batch and queue together make 4096, as the paper at 256"


def _rate(optimizer: str, batch: int) -> tuple[float, str]:
    if optimizer == "lars":
        rate = 4.8 * (min(batch, PAPER_BATCH) / PAPER_BATCH) ** 0.75
        return rate, "4.8 x (batch / 4096)^0.75: through the paper's 4.8 at 4096 and 0.6 at 256"
    if optimizer == "sgd":
        return 0.05 * batch / 256, "0.05 at batch 256, linear in the batch"
    return 5e-4 * batch / 256, "0.0005 at batch 256, linear in the batch"


def _warmup(batch: int, total: int) -> tuple[int, str]:
    if batch <= SMALL_BATCH:
        return 0, "none at small batches, as the paper"
    return WARMUP.of(total), "10% of the images, the paper's 10 epochs at most"


def _sync_batch_norm(config: Config, facts: Facts) -> tuple[int, str]:
    if facts.world_size < _RANKS_IN_GROUPS or config.training.topology_invariant:
        return 0, "batch statistics over all ranks"
    group = next(size for size in range(8, 0, -1) if facts.world_size % size == 0)
    if group == 1:
        return 0, f"over all ranks: {facts.world_size} do not fall into groups of 8 or fewer"
    return group, "groups of 8 ranks or the next divisor: the paper's, at half the cost of all ranks"


def _precision(facts: Facts) -> tuple[str, str]:
    if not facts.cuda:
        return "float32", "on the CPU"
    return ("bfloat16", "the GPU has it") if facts.bfloat16 else ("float16", "with loss scaling")
