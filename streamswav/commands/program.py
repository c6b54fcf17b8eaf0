"""What a training command brings to `run_training`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamswav.commands.run_folder import Run
from streamswav.config import Config
from streamswav.crops import MultiCrop
from streamswav.defaults import Choice, Facts
from streamswav.drain import Drain
from streamswav.stream.labels import Labels
from streamswav.stream.store import Store
from streamswav.telemetry.progress import Reporter
from streamswav.training.distributed import Ranks
from streamswav.training.evaluating import Evaluator
from streamswav.training.pace import Pace
from streamswav.training.task import Task


@dataclass(frozen=True)
class Start:
    """What there is when a run starts, before its shards are listed.

    Attributes:
        begun: complete configuration of the run that is continued; None: it is new.
    """

    begun: Config | None
    ranks: Ranks
    store: Store
    reporter: Reporter


@dataclass(frozen=True)
class Program:
    """What tells one kind of training from another; every rank calls all of it in the same order.

    Attributes:
        resolve: chooses what was left open.
        task: builds what is trained, of a configuration on the grid of these ranks.
        prepare: looks at what the configuration names, and completes it, before its shards are listed.
        parts: returns what crops the images, if not as pretraining does, and what tells their labels.
        finish: returns what the summary says beside what each one does, given the steps and images of the
            run that is done.
        images_bound: returns the images a second that the arithmetic of the ranks' GPUs allows; None where it
            is not known. Called on rank 0 alone.
        evaluator: returns what measures the run while it is trained.
    """

    resolve: Callable[[Config, Facts, Ranks], tuple[Config, list[Choice]]]
    task: Callable[[Run, Config, Pace], Task]
    prepare: Callable[[Config, Start], Config] = lambda config, _: config
    parts: Callable[[Run], tuple[MultiCrop | None, Labels | None]] = lambda _: (None, None)
    finish: Callable[[Run, Task, int, int], Mapping[str, Any]] = lambda *_: {}
    images_bound: Callable[[Run], float | None] = lambda _: None
    evaluator: Callable[[Run, Drain], Evaluator | None] = lambda *_: None
