"""What a run trains: the trainer knows no more of pretraining or finetuning than this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from streamswav.loader import Batch
from streamswav.training.learner import Learner, StepResult
from streamswav.training.pace import Stride


class Task(Protocol):
    """A learner, what it is given of a batch, and what it tells of itself."""

    @property
    def learner(self) -> Learner:
        """What is saved and restored."""

    @property
    def subject(self) -> nn.Module:
        """What evaluators measure, without its wrapper: images [B, 3, S, S] to features or scores."""

    def to_device(self, batch: Batch) -> Sequence[Tensor]:
        """Move to the device what a step needs of a batch, and augment it there."""

    def step(self, tensors: Sequence[Tensor], stride: Stride) -> StepResult:
        """Take one optimizer step. Nothing is read from the device."""

    def watch(self) -> None:
        """Take of the last step what `readings` will need. Nothing is read from the device."""

    def settled(self, skipped: Sequence[bool]) -> None:
        """Hear of the steps since the last time, in order, which of them were skipped."""

    def readings(self) -> Mapping[str, float]:
        """Read from the device what the log tells beside the loss, since the last time; by name."""
