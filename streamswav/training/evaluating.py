"""What measures a run while it is trained: all that the trainer knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from streamswav.training.distributed import Ranks
from streamswav.training.learner import running_statistics


class Evaluator(Protocol):
    """Measures a trunk; every rank calls it after the same step."""

    def due(self, images: int, batch: int) -> bool:
        """Tell whether a step of so many images, after which `images` were seen, is followed by a look."""

    def measure(self, subject: nn.Module, *, step: int, images: int) -> Mapping[str, float]:
        """Measure a task's subject.

        Returns:
            Shares from 0 to 1 by the probe's name, the same on all ranks; none where it gave up.
        """


@contextmanager
def as_saved(subject: nn.Module, ranks: Ranks) -> Iterator[nn.Module]:
    """Give a network, or a part, in eval mode as rank 0 would save it; afterwards nothing of it has changed.

    Without shared batch statistics each rank has running ones of its own, of which rank 0's count. Random
    states are put back as well: a run that is looked at goes on exactly as one that is not.
    """
    own = running_statistics(subject)
    kept = [each.clone() for each in own]
    training = subject.training
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if ranks.group is not None:
            for each in own:
                dist.broadcast(each, src=0, group=ranks.group)
        subject.eval()
        try:
            yield subject
        finally:
            subject.train(training)
            with torch.no_grad():
                for each, before in zip(own, kept, strict=True):
                    each.copy_(before)
