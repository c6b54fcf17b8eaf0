"""One optimizer step: crops in, weights moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer

from streamswav.errors import CheckpointError, ConfigError
from streamswav.models import SwAVNetwork
from streamswav.swav import FeatureQueue, SwAVLoss
from streamswav.training.masking import Undo


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for logs and health, all detached and on the device; reading it waits.

    Attributes:
        loss: scalar, of this rank's batch.
        grad_norm: norm of all gradients together.
        skipped: boolean scalar, the same on all ranks: loss or gradient was not finite on one of them, and
            weights, momenta, queue and running statistics are what they were before the step.
        embeddings: unit embeddings [N, B, D].
        scores: prototype scores [N, B, K].
        pushed: embeddings an assigned crop that went into the queue, should the step turn out to count.
        filled: the queue is full with them, should all the steps that filled it have counted.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    embeddings: Tensor
    scores: Tensor
    pushed: int
    filled: bool


class Learner:
    """Network, objective, queue and optimizer, and the order in which a step uses them.

    Args:
        network: a `SwAVNetwork`, wrapped in DistributedDataParallel where there are several ranks.
        objective: codes and loss.
        optimizer: over the network's parameters.
        crops: N, crops an image.
        queue: past embeddings of this rank; None: never any.
        scaler: loss scaling, for float16.
        autocast: type of the forward pass; None: the parameters'.
        learn_prototypes: False leaves the prototypes as they were drawn (paper, appendix C.2).
    """

    def __init__(
        self,
        network: SwAVNetwork | DistributedDataParallel,
        objective: SwAVLoss,
        optimizer: Optimizer,
        *,
        crops: int,
        queue: FeatureQueue | None = None,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        learn_prototypes: bool = True,
    ) -> None:
        self.network = network
        self.objective = objective
        self.optimizer = optimizer
        self.queue = queue
        self._crops = crops
        self._prototypes = self.module.prototypes
        self._device_type = self._prototypes.weight.device.type
        self._scaler = scaler or torch.amp.GradScaler(self._device_type, enabled=False)
        self._autocast = autocast
        self._learn_prototypes = learn_prototypes
        self._undo = Undo([*running_statistics(self.module), self._prototypes.weight])

    @property
    def module(self) -> SwAVNetwork:
        """The network without its wrapper."""
        wrapped = isinstance(self.network, DistributedDataParallel)
        return cast("SwAVNetwork", self.network.module if wrapped else self.network)

    def step(
        self, crops: Sequence[Tensor], *, rate: float, freeze_prototypes: bool, use_queue: bool
    ) -> StepResult:
        """Take one optimizer step. Nothing is read from the device.

        Args:
            crops: float tensors [n_i * B, 3, S_i, S_i], crop-major, the n_i adding up to N.
            rate: learning rate.
            freeze_prototypes: leave the prototypes and their momentum alone.
            use_queue: fill the queue, and assign with it once it is full.
        """
        queue = self.queue if use_queue else None
        self._undo.remember()
        self._prototypes.normalise_()
        embeddings, scores = self._forward(crops)
        past = queue if queue is not None and queue.full else None
        loss = self.objective(scores, self._prototypes.weight, past).loss
        self._backward(loss)
        if freeze_prototypes or not self._learn_prototypes:
            # None, not zero: no momentum step. DDP asks that requires_grad never changes.
            self._prototypes.weight.grad = None
        grad_norm, skipped = self._update(rate)
        self._undo.where(skipped)
        embeddings, scores = embeddings.detach(), scores.detach()
        if queue is not None:
            queue.push(torch.stack([embeddings[crop] for crop in self.objective.assigned]), unless=skipped)
        pushed = scores.shape[1] if queue is not None else 0
        filled = queue is not None and queue.full and past is None
        return StepResult(loss.detach(), grad_norm, skipped, embeddings, scores, pushed, filled)

    def take_back(self, pushed: int) -> None:
        """Hear that a step which pushed so many embeddings was skipped."""
        if self.queue is not None:
            self.queue.take_back(pushed)

    def rehearse(self, crops: Sequence[Tensor]) -> None:
        """Run one backward pass and discard it; parameters, statistics and queue stay as they were.

        DistributedDataParallel lays its buckets out anew after its first backward pass, which changes
        the order of summation on three and more ranks. Rehearsed at each start, a resumed run sums in
        the same order as one that was never stopped.
        """
        kept = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        _, scores = self._forward(crops)
        self._backward(scores.mean())
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain containers, fit for `weights_only` loading; the queue is this rank's."""
        return {
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "queue": self.queue.state_dict() if self.queue is not None else None,
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: the state is that of another network, optimizer or queue.
        """
        if (state["queue"] is None) != (self.queue is None):
            raise CheckpointError("the checkpoint and swav.queue_length disagree on whether there is a queue")
        try:
            self.module.load_state_dict(state["network"])
            self._load_optimizer(state["optimizer"])
            if self.queue is not None:
                self.queue.load_state_dict(state["queue"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint is of another model: {reason}") from None
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over the momenta; weight decay and the like are what is configured now."""
        configured = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)

    def _forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return embeddings [N, B, D] and scores [N, B, K]."""
        enabled = self._autocast is not None
        with torch.autocast(self._device_type, dtype=self._autocast, enabled=enabled), _naming_too_few():
            embeddings, scores = self.network(crops)
        return embeddings.unflatten(0, (self._crops, -1)), scores.unflatten(0, (self._crops, -1))

    def _backward(self, loss: Tensor) -> None:
        """Compute the gradient. Where the loss is not finite all of it is made NaN.

        So every rank sees it in the gradient that they share, and none needs to be told.
        """
        self.optimizer.zero_grad()
        slope = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self._scaler.scale(loss).backward(slope)  # type: ignore[no-untyped-call]  # torch leaves backward untyped

    def _update(self, rate: float) -> tuple[Tensor, Tensor]:
        """Move the parameters unless the norm of their unscaled gradients is not finite.

        Returns:
            The norm, and whether the step was skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        skipped = norm.isfinite().logical_not()
        # What a GradScaler hands over; ours is asked only for the scale, since it knows overflow alone.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]  # torch sets these two on all of them
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._scaler.update()
        return norm, skipped


@contextmanager
def _naming_too_few() -> Iterator[None]:
    """Make a mistake of the user's of what a batch norm says that has one value to take statistics of."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        reason = "too few images at once for batch statistics: a larger batch a rank, or fewer micro_batches"
        raise ConfigError("training.batch", reason) from None


def running_statistics(network: torch.nn.Module) -> list[Tensor]:
    """Return the buffers of a network's batch norms."""
    norms = (each for each in network.modules() if isinstance(each, _BatchNorm))
    return [buffer for each in norms for buffer in each.buffers()]
