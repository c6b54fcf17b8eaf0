"""Which steps counted: a step is skipped on the device, and the host learns of it at logs and saves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from streamswav.config import TrainingSection
from streamswav.errors import NonFiniteError
from streamswav.loader import Batch
from streamswav.training.feed import Feed
from streamswav.training.learner import Learner, StepResult
from streamswav.training.task import Task

PROBATION_STEPS = 1000
SUSPICIOUS = 3
"""So many skipped steps in a row are no longer a loss scale that was tried and found too large."""

REMEDIES = "lower optimizer.rate, raise swav.epsilon, or use training.precision float32"


@dataclass(frozen=True)
class Settled:
    """The steps since the last reading: images of all ranks that were trained, steps that did not count."""

    trained: int
    skipped_steps: int


class OpenSteps:
    """Keeps the steps whose outcome has not been read, and what is known of those before.

    Args:
        section: the budget.
        task: hears which steps did not count.
        feed: hears what samples were skipped.

    Attributes:
        in_a_row: skipped steps up to the last one that was read.
    """

    def __init__(self, section: TrainingSection, task: Task, feed: Feed) -> None:
        self._section, self._task, self._feed = section, task, feed
        self._open: list[tuple[Batch, Tensor]] = []
        self._steps = self._skipped = self._longest = 0
        self.in_a_row = 0

    def add(self, batch: Batch, result: StepResult) -> None:
        """Take note of a step; pixels, parameters and labels are let go of.

        A batch's tensors lie in memory that a loader process shares, each with an open file.
        """
        light = replace(batch, pixels=(), parameters=torch.empty(0), labels=None)
        self._open.append((light, result.skipped))

    def settle(self) -> Settled:
        """Read which steps were skipped, and tell the feed; every rank must call this after the same step."""
        if not self._open:
            return Settled(0, 0)
        flags: list[bool] = torch.stack([skipped for _, skipped in self._open]).tolist()
        self._longest = self.in_a_row
        for (batch, _), skipped in zip(self._open, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            self._longest = max(self._longest, self.in_a_row)
            if skipped:
                self._feed.skip(batch)
        self._task.settled(flags)
        self._open.clear()
        skipped_steps, batch_size = sum(flags), self._feed.position.grid.batch
        self._steps += len(flags)
        self._skipped += skipped_steps
        return Settled((len(flags) - skipped_steps) * batch_size, skipped_steps)

    def check(self, step: int, *, last: bool = False) -> None:
        """Hold the skipped steps to their budget; `last`: a run that ends may not end with several of them.

        Raises:
            NonFiniteError: the budget is spent; the weights are those from before these steps.
        """
        row, share = self._section.nonfinite_in_a_row, self._section.nonfinite_ratio
        budget = f"training.nonfinite_in_a_row = {row}"
        if self.in_a_row >= (min(row, SUSPICIOUS) if last else row):
            raise _spent(step, f"the last {self.in_a_row} steps", budget)
        if self._longest >= row:
            raise _spent(step, f"{self._longest} steps in a row", budget)
        if self._steps >= PROBATION_STEPS and self._skipped > share * self._steps:
            counted = f"{self._skipped} of {self._steps} steps"
            raise _spent(step, counted, f"training.nonfinite_ratio = {share}")


def _spent(step: int, which: str, budget: str) -> NonFiniteError:
    return NonFiniteError(
        f"{which} up to step {step} had a loss or gradient that is not finite and were skipped ({budget}): "
        f"{REMEDIES}; what was saved is from before, skipped_step/ lists their samples"
    )


def refuse_unbounded(learner: Learner, step: int) -> None:
    """Refuse weights whose norm is beyond float32: a step broke them, although its loss was a number.

    Raises:
        NonFiniteError: they are so.
    """
    if not get_total_norm(list(learner.module.parameters())).isfinite():
        raise NonFiniteError(
            f"the weights have grown beyond all bounds at step {step} and are not saved: {REMEDIES}; the "
            "last checkpoint is from before"
        )
