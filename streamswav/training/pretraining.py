"""Pretraining as a task: crops, the queue's and the prototypes' times, the state of the representation."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamswav.config import Config
from streamswav.crops import Augment
from streamswav.defaults import FREEZE, QUEUE_START
from streamswav.loader import Batch
from streamswav.telemetry.representation import Window, gradient_norms, staleness, unique_prototypes
from streamswav.training.distributed import Ranks
from streamswav.training.learner import StepResult
from streamswav.training.pace import Pace, Stride
from streamswav.training.swav_learner import SwAVLearner, SwAVStep


@dataclass(frozen=True)
class Calendar:
    """When prototypes rest and the queue is used, in the unit of the run's pace.

    Attributes:
        freeze_until: the prototypes rest until then.
        queue_from: the queue is used from then on.
    """

    freeze_until: float
    queue_from: float

    def freezes(self, stride: Stride) -> bool:
        """Tell whether the prototypes rest in a step."""
        return stride.done < self.freeze_until

    def queues(self, stride: Stride) -> bool:
        """Tell whether a step uses the queue."""
        return stride.done >= self.queue_from


def make_calendar(config: Config, pace: Pace) -> Calendar:
    """Build the calendar of a resolved configuration.

    Raises:
        ConfigError: amounts of images are given, but the number of samples is not known.
    """
    swav = config.swav
    pace.refuse_images("swav.freeze_prototypes_images", swav.freeze_prototypes_images)
    pace.refuse_images("swav.queue_start_images", swav.queue_start_images)
    freeze = pace.amount(swav.freeze_prototypes_images, FREEZE)
    return Calendar(freeze, pace.amount(swav.queue_start_images, QUEUE_START))


class Pretraining:
    """Swapped prediction (paper, section 3) as what a trainer trains.

    Args:
        learner: takes the steps.
        augment: of the crops, on the device.
        calendar: of prototypes and queue.
        prototypes: K.
        ranks: those that train.
    """

    def __init__(
        self,
        learner: SwAVLearner,
        augment: Augment,
        calendar: Calendar,
        *,
        prototypes: int,
        ranks: Ranks,
    ) -> None:
        self.learner = learner
        self._augment, self._calendar, self._ranks = augment, calendar, ranks
        objective = learner.objective
        self._temperature = objective.temperature
        self._window = Window(
            prototypes, assigned=objective.assigned, temperature=objective.temperature, device=ranks.device
        )
        self._unwatched: SwAVStep | None = None
        self._pushed: deque[int] = deque()
        self._frozen = False

    @property
    def subject(self) -> nn.Module:
        """The trunk: images [B, 3, S, S] to features [B, F]."""
        return self.learner.module.trunk

    def to_device(self, batch: Batch) -> list[Tensor]:
        """Move the crops to the device and augment them there, resolution by resolution."""
        counts = [len(pixels) for pixels in batch.pixels]
        by_resolution = zip(batch.pixels, torch.split(batch.parameters, counts), strict=True)
        return [
            self._augment(pixels.to(self._ranks.device, non_blocking=True), parameters)
            for pixels, parameters in by_resolution
        ]

    def step(self, tensors: Sequence[Tensor], stride: Stride) -> StepResult:
        """Take one optimizer step on crops. Nothing is read from the device."""
        calendar = self._calendar
        self._frozen = calendar.freezes(stride)
        result = self.learner.step(
            tensors,
            rate=stride.rate,
            freeze_prototypes=self._frozen,
            use_queue=calendar.queues(stride),
        )
        self._pushed.append(result.pushed)
        self._unwatched = result
        # Embeddings and scores are not held on to until somebody reads the step.
        return StepResult(result.loss, result.grad_norm, result.skipped, result.look)

    def watch(self) -> None:
        """Add the last step to the window, and let go of its embeddings and scores."""
        if (last := self._unwatched) is not None:
            self._window.add(last.embeddings, last.scores, last.features, skipped=last.skipped)
            self._unwatched = None

    def settled(self, skipped: Sequence[bool]) -> None:
        """Take back from the queue's account what steps pushed that did not count."""
        for each in skipped:
            pushed = self._pushed.popleft()
            if each:
                self.learner.take_back(pushed)

    def readings(self) -> Mapping[str, float]:
        """Return what the steps since the last time showed, by `telemetry.representation`."""
        ranks, module, queue = self._ranks, self.learner.module, self.learner.queue
        found = self._window.read(ranks.add_up, ranks=ranks.world_size, leads=ranks.leads)
        prototypes = normalize(module.prototypes.weight.detach(), dim=1)
        found["prototypes_frozen"] = float(self._frozen)
        found["prototypes_unique_ratio"] = float(unique_prototypes(prototypes))
        if queue is not None:
            found["queue_fill_ratio"] = queue.fill
            if queue.full:
                stale = staleness(queue.features[0], prototypes, self._temperature)
                found["queue_staleness_ratio"] = float(stale)
        parts = {"trunk": module.trunk, "head": module.projection_head, "prototypes": module.prototypes}
        return found | gradient_norms({name: part.parameters() for name, part in parts.items()})
