"""`streamswav lowshot`: finetune on n images a class by several seeds, and say mean and spread."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from streamswav.commands.finetune import finetune
from streamswav.config import Config
from streamswav.drain import Drain
from streamswav.errors import ConfigError, DrainedError
from streamswav.stream.store import Store, join
from streamswav.telemetry.progress import Reporter
from streamswav.transfer.finetuning.defaults import complete, rules_of_trunk
from streamswav.transfer.finetuning.lowshot import Cell, collect, draw_images, finished, make_cells, to_table
from streamswav.transfer.finetuning.measuring import RESULTS_FILE
from streamswav.transfer.weights.trunks import open_trunk


def lowshot(config: Config, drain: Drain, *, listed: Sequence[str] | None = None) -> None:
    """Run the cells of the grid that are not done, one after the other, then say what all came to.

    Args:
        config: of the grid, as it was given, over `FINETUNE_BASE`.
        drain: whether to stop; the cell that runs is saved.
        listed: the words of this command; the cells that are not done are then only listed, as commands.

    Raises:
        DrainedError: stopped by a signal; the same command goes on.
        StreamswavError: as `finetune`.
    """
    if not config.run.directory:
        raise ConfigError("run.directory", "say where the runs are kept, as --run.directory runs/lowshot")
    if not config.stream.urls:
        raise ConfigError("stream.urls", "say where the shards are, as --stream.urls s3://bucket/shards/")
    store, reporter = Store(config.storage), Reporter()
    if store.exists(join(config.run.directory, "config.yaml")):
        reason = "holds a run; the grid needs a folder of its own for its runs"
        raise ConfigError("run.directory", reason, value=config.run.directory)
    cells = make_cells(config, _keys_of_trunk(config))
    done = {place: results for place, cell in enumerate(cells) if (results := finished(cell, store))}
    open_cells = [cell for place, cell in enumerate(cells) if place not in done]
    if listed is not None:
        sys.stdout.writelines(_command(cell, listed) + "\n" for cell in open_cells)
        return
    reporter.event("lowshot", f"{len(cells)} runs, of which {len(done)} are done", runs=len(cells))
    draw_images(open_cells, store)
    for place, cell in enumerate(cells):
        if place in done:
            continue
        if drain():
            raise DrainedError("stopped by a signal between two runs: the same command continues")
        reporter.event("cell", f"run {place + 1} of {len(cells)}: {cell.config.run.directory}")
        finetune(cell.config, drain)
        results = finished(cell, store)
        assert results is not None, "a finetuning that is done has results"
        done[place] = results
    found = collect(config, cells, [done[place] for place in range(len(cells))])
    store.write(join(config.run.directory, RESULTS_FILE), found.to_json().encode())
    sys.stdout.write(to_table(found) + "\n")


def _keys_of_trunk(config: Config) -> dict[str, Any]:
    """Return what a trunk from scratch has in common with the one that `model.init` names."""
    if not config.model.init or not config.lowshot.baselines:
        return {}
    _, info = open_trunk(config.model.init, storage=config.storage)
    _, choices = complete(config, None, rules_of_trunk(info.config))
    return {choice.key: choice.value for choice in choices}


def _command(cell: Cell, words: Sequence[str]) -> str:
    """Return the command that runs a cell anywhere."""
    keys = {key: value for key, value in cell.keys.items() if key != "model.init"}
    given = [text for key, value in keys.items() for text in (f"--{key}", _text(value))]
    scratch = ["--init", "scratch"] if "model.init" in cell.keys else []
    return shlex.join(["streamswav", "launch", "finetune", *words, *given, *scratch])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
