"""Low shot: a grid of n images a class, seeds and beginnings, each cell a finetuning run of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from streamswav.config import Config, parse_config
from streamswav.errors import ConfigError
from streamswav.stream.store import Store, join, redact
from streamswav.training.feeding import build_selection
from streamswav.transfer.finetuning.finetune import load_both, subset_of
from streamswav.transfer.finetuning.measuring import RESULTS_FILE
from streamswav.transfer.measuring.results import DataUsed, Results, Value, over_runs
from streamswav.transfer.measuring.results_file import read_results
from streamswav.transfer.subsets.subset import draw_subsets

FINETUNED, SCRATCH = "checkpoint", "scratch"

_CONFIG_FILE = "config.yaml"
_DECIDING = ("crops", "finetune", "model", "optimizer", "stream", "training")
_NOT_DECIDING = ("stream.urls", "stream.samples", "training.threads", "training.device", "finetune.subset_to")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        column: `FINETUNED` or `SCRATCH`.
        per_class: n.
        seed: of draw and training.
        keys: of the configuration, that make the grid's this cell's.
        config: of the run.
    """

    column: str
    per_class: int
    seed: int
    keys: Mapping[str, Any]
    config: Config


def make_cells(config: Config, trunk: Mapping[str, Any]) -> list[Cell]:
    """Return the grid's cells, those of a seed one after the other.

    Args:
        config: of the grid, with what was given in its sections' `model_fields_set`.
        trunk: keys that a trunk from scratch takes over from the one that it is compared with.

    Raises:
        ConfigError: keys of `lowshot.scratch` that do not exist or do not fit.
    """
    section, directory = config.lowshot, config.run.directory
    cells = []
    for per_class in section.per_class:
        for seed in section.seeds:
            for column in (FINETUNED, *section.baselines):
                name = "scratch" if column == SCRATCH or not config.model.init else "finetuned"
                keys: dict[str, Any] = {
                    "run.directory": join(directory, f"{name}-{per_class}-seed-{seed}"),
                    "stream.seed": seed,
                    "finetune.per_class": per_class,
                    "finetune.subset_seed": seed,
                    "finetune.subset_to": join(directory, f"images-{per_class}-seed-{seed}"),
                }
                if column == SCRATCH:
                    keys |= {"model.init": "", **trunk, **section.scratch}
                cells.append(Cell(column, per_class, seed, keys, with_keys(config, keys)))
    return cells


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return the configuration with other values, which then count as given.

    Raises:
        ConfigError: a key that does not exist, or a value that does not fit.
    """
    values = config.model_dump()
    for key, value in keys.items():
        section, _, field = key.partition(".")
        if not isinstance(values.get(section), dict):
            raise ConfigError(key, "there is no such key", value=value)
        values[section][field] = value
    checked = parse_config(values)
    changed: dict[str, dict[str, Any]] = {}
    for key in keys:
        section, _, field = key.partition(".")
        changed.setdefault(section, {})[field] = getattr(getattr(checked, section), field)
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changed.items()}
    return config.model_copy(update=sections)


def finished(cell: Cell, store: Store) -> Results | None:
    """Return the results of a cell whose run is done, wherever it was run.

    Raises:
        ConfigError: it was run with another configuration.
    """
    directory = cell.config.run.directory
    place = join(directory, RESULTS_FILE)
    if not store.exists(place):
        return None
    ran = parse_config(yaml.safe_load(store.read(join(directory, _CONFIG_FILE))))
    for name in _DECIDING:
        wanted, had = getattr(cell.config, name), getattr(ran, name)
        for field in sorted(wanted.model_fields_set):
            key, now, then = f"{name}.{field}", getattr(wanted, field), getattr(had, field)
            if key not in _NOT_DECIDING and now not in (then, None):
                reason = (
                    f"{redact(directory)} is done and was run with {then!r}: choose another run.directory"
                )
                raise ConfigError(key, reason, value=now)
    return read_results(place, store)


def draw_images(cells: Sequence[Cell], store: Store) -> None:
    """Draw the images of all cells in one pass over the shards.

    Raises:
        StreamswavError: as `draw_subsets`.
    """
    if not cells:
        return
    config = cells[0].config
    requests = dict(subset_of(cell.config) for cell in cells)
    train, _ = load_both(config, store)
    select = build_selection(config, store)
    draw_subsets(config.stream.urls, requests, storage=config.storage, labels=train, select=select)


def collect(config: Config, cells: Sequence[Cell], found: Sequence[Results]) -> Results:
    """Return mean, spread and interval over the seeds, and of the differences seed by seed.

    Args:
        config: of the grid.
        cells: all of them.
        found: the results of each.
    """
    runs: dict[tuple[int, str], dict[int, Mapping[str, float]]] = {}
    for cell, results in zip(cells, found, strict=True):
        runs.setdefault((cell.per_class, cell.column), {})[cell.seed] = results.values[0].scores
    settings = {
        (cell.per_class, cell.column): results.values[0].settings
        for cell, results in zip(cells, found, strict=True)
    }
    values = [
        over_runs(_name(per_class), settings[per_class, column], column, by_seed)
        for (per_class, column), by_seed in runs.items()
    ]
    values += _differences(runs)
    first = found[0]
    train = DataUsed([redact(url) for url in config.stream.urls], 0, first.data["train"].classes)
    model = {name: first.model[name] for name in ("trunk", "width", "stem", "classes")}
    model["init"] = redact(config.model.init) or "scratch"
    seeds = {f"run {number}": seed for number, seed in enumerate(config.lowshot.seeds)}
    data = {"train": train, "test": first.data["test"]}
    return Results(model, data, first.preprocessing, seeds, values, command="lowshot")


def _differences(runs: Mapping[tuple[int, str], Mapping[int, Mapping[str, float]]]) -> Iterator[Value]:
    """Return what each cell has over the baseline of the same n and seed, which has the same images."""
    for (per_class, column), by_seed in runs.items():
        if column == SCRATCH:
            other = runs[per_class, FINETUNED]
            gains = {
                seed: {metric: other[seed][metric] - share for metric, share in scores.items()}
                for seed, scores in by_seed.items()
            }
            about = {"of": FINETUNED, "over": SCRATCH, "paired": "the same images and seed"}
            yield over_runs(_name(per_class), about, "difference", gains)


def to_table(results: Results) -> str:
    """Return lines for people: mean and standard deviation in per cent, and the interval of the mean."""
    rows = [("images a class", "", "mean", "spread", "95% interval", "by seed")]
    for value in results.values:
        shares = value.by_seed["top1"] if "top1" in value.by_seed else next(iter(value.by_seed.values()))
        metric = "top1" if "top1" in value.by_seed else next(iter(value.by_seed))
        interval = value.intervals.get(metric)
        rows.append(
            (
                value.protocol,
                value.column,
                f"{100 * value.scores[metric]:.2f}",
                f"{100 * value.spread[metric]:.2f}" if metric in value.spread else "-",
                f"{100 * interval.low:.2f} to {100 * interval.high:.2f}" if interval else "-",
                " ".join(f"{100 * share:.2f}" for share in shares.values()),
            )
        )
    wide = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(size) for text, size in zip(row, wide, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def _name(per_class: int) -> str:
    return f"{per_class} images a class"
