"""`streamswav finetune`: train trunk and head, or heads alone, on labelled shards, and measure them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamswav.commands.program import Program, Start
from streamswav.commands.run_folder import Run
from streamswav.commands.training_run import run_training, tell_choices
from streamswav.config import Config
from streamswav.crops import MultiCrop
from streamswav.defaults import Choice, Facts, resolve
from streamswav.drain import Drain
from streamswav.errors import ConfigError
from streamswav.models import Trunk
from streamswav.stream.labels import Labels
from streamswav.stream.store import join, redact
from streamswav.training.distributed import Ranks
from streamswav.training.evaluating import Evaluator
from streamswav.training.pace import Pace
from streamswav.training.task import Task
from streamswav.transfer.finetuning.defaults import complete, rules_of_trunk, rules_that_hold
from streamswav.transfer.finetuning.finetune import (
    LabelledData,
    build_crop,
    build_finetuning,
    open_for_all,
    prepare_data,
)
from streamswav.transfer.finetuning.measuring import RESULTS_FILE, Measuring, refuse_unlabelled
from streamswav.transfer.measuring.results import DataUsed


def finetune(config: Config, drain: Drain) -> dict[str, Any]:
    """Run, or go on with, the finetuning that the configuration describes.

    Args:
        config: as it was given, over `FINETUNE_BASE`.
        drain: whether to stop; from the first step on a stop saves.

    Returns:
        The summary that is written beside the checkpoints, with what was measured; `results.json` beside it
        has all of that.

    Raises:
        DrainedError: stopped by a signal; everything is saved.
        StreamswavError: as the configuration, the data or the store deserve.
    """
    if config.run.task != "finetune":
        reason = "this is the configuration of a pretraining run; streamswav pretrain goes on with it"
        raise ConfigError("run.task", reason, value=config.run.task)
    parts = _Parts()
    program = Program(
        parts.resolve,
        parts.build_task,
        prepare=parts.prepare,
        parts=parts.feeding,
        finish=parts.finish,
        evaluator=parts.evaluator,
    )
    return run_training(config, drain, program)


class _Parts:
    """Finetuning as `run_training` asks for it, in the order in which it does."""

    _data: LabelledData
    _trunk: Trunk | None = None
    _measuring: Measuring

    def prepare(self, config: Config, start: Start) -> Config:
        """Open the trunk, read the labels, draw the subset."""
        source = start.begun
        if config.model.init and source is None:
            source = self._open_trunk(config, start)
        given = config
        config, choices = complete(config, start.begun, rules_of_trunk(source))
        if source is not None:
            _refuse_other_trunk(given, source)
        tell_choices(choices, start.reporter)
        self._data = prepare_data(config, start.ranks, start.store)
        data = self._data
        if not data.config.labels.split:
            refuse_unlabelled(data, start.ranks)
        return data.config

    def resolve(self, config: Config, facts: Facts, _: Ranks) -> tuple[Config, list[Choice]]:
        """Choose by finetuning's rules first, then by the general ones."""
        samples = config.stream.samples or facts.samples
        facts = replace(facts, samples=samples)
        config, own = complete(config, facts.begun, rules_that_hold(config, facts))
        config, general = resolve(config, facts)
        return config, own + general

    def feeding(self, run: Run) -> tuple[MultiCrop | None, Labels | None]:
        """Return the crop of finetuning, and the labels."""
        return build_crop(run.config), self._data.train

    def build_task(self, run: Run, config: Config, _: Pace) -> Task:
        """Build network and optimizer."""
        trunk, self._trunk = self._trunk, None
        return build_finetuning(config, trunk, run.ranks, multi=self._data.train.multi)

    def evaluator(self, run: Run, drain: Drain) -> Evaluator:
        """Return what measures it."""
        data, manifest = self._data, run.manifest
        used = DataUsed(
            [redact(url) for url in run.config.stream.urls],
            run.config.stream.samples or 0,
            run.config.labels.classes or 0,
            shards=manifest.digest,
        )
        self._measuring = Measuring(run.config, data, used, ranks=run.ranks, store=run.store, drain=drain)
        return self._measuring

    def finish(self, run: Run, task: Task, step: int, images: int) -> Mapping[str, Any]:
        """Measure what the training came to, unless that is done, and write it."""
        run.metrics.set_state("evaluating")
        results = self._measuring.finish(task.subject, step=step, images=images)
        if run.ranks.leads:
            run.reporter.event("results", results.to_table())
        value = results.values[0]
        return {
            "test": dict(value.scores),
            "results": redact(join(run.config.run.directory, RESULTS_FILE)),
        }

    def _open_trunk(self, config: Config, start: Start) -> Config:
        """Open the trunk; return the configuration it was trained with."""
        self._trunk, info = open_for_all(config, start.ranks)
        start.reporter.event("init", f"the trunk begins as {info.url}: {info.report}", layout=info.layout)
        return info.config


def _refuse_other_trunk(given: Config, source: Config) -> None:
    for field in ("trunk", "width", "stem"):
        wanted, has = getattr(given.model, field), getattr(source.model, field)
        if field in given.model.model_fields_set and wanted != has:
            reason = f"the trunk of model.init has {has!r}; leave it out"
            raise ConfigError(f"model.{field}", reason, value=wanted)
