"""`streamswav pretrain`: train a trunk by swapped prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from streamswav.commands.initial import Initial
from streamswav.commands.program import Program
from streamswav.commands.run_folder import Run
from streamswav.commands.training_run import run_training
from streamswav.config import Config
from streamswav.crops import Augment
from streamswav.defaults import Choice, Facts, known, resolve
from streamswav.drain import Drain
from streamswav.planning import images_bound, largest_batch, recognise
from streamswav.training.build import build_learner
from streamswav.training.distributed import Ranks
from streamswav.training.pace import Pace
from streamswav.training.pretraining import Pretraining, make_calendar
from streamswav.training.task import Task
from streamswav.transfer.probe import Probe


def pretrain(config: Config, drain: Drain) -> dict[str, Any]:
    """Run, or go on with, the pretraining that the configuration describes.

    Args:
        config: as it was given.
        drain: whether to stop; from the first step on a stop saves.

    Returns:
        The summary that is written beside the checkpoints.

    Raises:
        DrainedError: stopped by a signal; everything is saved.
        StreamswavError: as the configuration, the data or the store deserve.
    """
    initial = Initial()
    program = Program(
        resolve_open,
        lambda run, config, pace: _build_task(run, config, pace, initial),
        prepare=initial.prepare,
        finish=_finish,
        evaluator=_build_probe,
        images_bound=_images_bound,
    )
    return run_training(config, drain, program)


def resolve_open(config: Config, facts: Facts, ranks: Ranks) -> tuple[Config, list[Choice]]:
    """Choose what was left open by the rules of `defaults`; on a GPU the batch by what fits.

    Raises:
        ConfigError: the given values and the facts do not fit together.
    """
    cuda = facts.cuda
    memory = min(ranks.gather(torch.cuda.get_device_properties(ranks.device).total_memory if cuda else 0))
    if cuda and config.training.batch is None and facts.begun is None:
        fitting = ranks.lead(lambda: largest_batch(config, facts, memory=memory))
        facts = replace(facts, images_that_fit=fitting)
    return resolve(config, facts)


def _build_task(run: Run, config: Config, pace: Pace, initial: Initial) -> Task:
    prototypes = known(config.swav.prototypes)
    run.metrics.set("prototypes", prototypes)
    learner = build_learner(config, run.ranks)
    initial.give(learner.module, run)
    return Pretraining(
        learner,
        Augment(config.crops),
        make_calendar(config, pace),
        prototypes=prototypes,
        ranks=run.ranks,
    )


def _build_probe(run: Run, drain: Drain) -> Probe | None:
    if run.config.evaluation.every is None:
        return None
    return Probe(run.config, run.ranks, run.store, run.reporter, give_up=drain)


def _images_bound(run: Run) -> float | None:
    """Return it for GPUs of a known type. **Not yet run on a GPU.**"""
    if run.ranks.device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(run.ranks.device)
    gpu = recognise(found.name, found.total_memory)
    return images_bound(run.config, gpu, world_size=run.ranks.world_size) if gpu else None


def _finish(run: Run, *_: object) -> Mapping[str, Any]:
    return {"ln_prototypes": math.log(known(run.config.swav.prototypes))}
