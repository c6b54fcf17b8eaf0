"""Steps whose outcome nobody has read yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

from streamswav.config import TrainingSection
from streamswav.loader import Batch
from streamswav.training.learner import StepResult
from streamswav.training.open_steps import OpenSteps


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor that a value holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def test_a_step_that_is_not_read_yet_holds_its_flag_and_no_memory_beside() -> None:
    steps = OpenSteps(TrainingSection(), cast("Any", None), cast("Any", None))
    large, flag = [torch.zeros(8, 8) for _ in range(4)], torch.tensor(False)
    batch = Batch(0, (large[0],), large[1], (), (), (), {}, 0, {}, (), (), {}, (), large[2])
    steps.add(batch, StepResult(torch.zeros(()), torch.zeros(()), flag))
    held = [each for each in tensors(steps._open) if each.untyped_storage().nbytes()]
    assert len(held) == 1
    assert held[0] is flag
