"""One optimizer step of pretraining: crops in, weights moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from streamswav.errors import CheckpointError
from streamswav.models import SwAVNetwork
from streamswav.swav import FeatureQueue, SwAVLoss
from streamswav.training.distributed import Ranks
from streamswav.training.learner import Learner, StepResult, of_another_model


@dataclass(frozen=True, kw_only=True)
class SwAVStep(StepResult):
    """A step of pretraining; `look` is set where it filled the queue, should all those before have counted.

    Attributes:
        embeddings: unit embeddings [N, B, D].
        scores: prototype scores [N, B, K].
        features: of the trunk [N, B, F].
        pushed: embeddings an assigned crop that went into the queue, should the step turn out to count.
    """

    embeddings: Tensor
    scores: Tensor
    features: Tensor
    pushed: int


class SwAVLearner(Learner):
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

    own_state: ClassVar[tuple[str, ...]] = ("queue",)

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
        wrapped = isinstance(network, DistributedDataParallel)
        self._prototypes = cast("SwAVNetwork", network.module if wrapped else network).prototypes
        undo = [self._prototypes.weight]
        super().__init__(network, optimizer, scaler=scaler, autocast=autocast, undo=undo)
        self.objective = objective
        self.queue = queue
        self._crops = crops
        self._learn_prototypes = learn_prototypes
        self._features: Tensor | None = None
        # What the head is given; so neither the network nor DDP around it has a third result to hand on.
        self.module.projection_head.register_forward_pre_hook(self._see)

    @property
    def module(self) -> SwAVNetwork:
        """The network without its wrapper."""
        return cast("SwAVNetwork", super().module)

    def step(
        self, crops: Sequence[Tensor], *, rate: float, freeze_prototypes: bool, use_queue: bool
    ) -> SwAVStep:
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
        features = self._take_features()
        past = queue if queue is not None and queue.full else None
        with self.clock.within("sinkhorn"):
            codes = self.objective.codes(scores.detach(), self._prototypes.weight.detach(), past)
        loss = self.objective.loss(scores, codes)
        self._backward(loss)
        self.clock.enter("optimizer")
        if freeze_prototypes or not self._learn_prototypes:
            # None, not zero: no momentum step. DDP asks that requires_grad never changes.
            self._prototypes.weight.grad = None
        grad_norm, skipped = self._update(rate)
        self._undo.where(skipped)
        embeddings, scores = embeddings.detach(), scores.detach()
        if queue is not None:
            queue.push(torch.stack([embeddings[crop] for crop in self.objective.assigned]), unless=skipped)
        return SwAVStep(
            loss.detach(),
            grad_norm,
            skipped,
            # Whether the queue is full must not depend on when somebody looks.
            look=queue is not None and queue.full and past is None,
            embeddings=embeddings,
            scores=scores,
            features=features,
            pushed=scores.shape[1] if queue is not None else 0,
        )

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
        with self._buffers_kept():
            _, scores = self._forward(crops)
            self._take_features()
            self._backward(scores.mean())
            self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain containers, fit for `weights_only` loading; the queue is this rank's."""
        queue = self.queue.state_dict() if self.queue is not None else None
        return {**super().state_dict(), "queue": queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: the state is that of another network, optimizer or queue.
        """
        if (state["queue"] is None) != (self.queue is None):
            raise CheckpointError("the checkpoint and swav.queue_length disagree on whether there is a queue")
        super().load_state_dict(state)
        if self.queue is not None:
            try:
                self.queue.load_state_dict(state["queue"])
            except (RuntimeError, ValueError) as error:
                raise of_another_model(error) from None

    def own_part(
        self, by_rank: Sequence[Mapping[str, Any]], ranks: Ranks, *, saved: int, batch: int
    ) -> dict[str, Any]:
        """Return this rank's share of the queues that all ranks saved."""
        queues = [state["queue"] for state in by_rank]
        own = queues[0]
        features = [each["features"] for each in queues] if own else []
        length = self.queue.features.shape[1] if self.queue is not None else 0
        if length and features:
            own = {"features": _own_queue(features, ranks, saved=saved, batch=batch, length=length)}
        return {"queue": own}

    def _forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return embeddings [N, B, D] and scores [N, B, K]."""
        with self._forward_pass():
            embeddings, scores = self.network(crops)
        return embeddings.unflatten(0, (self._crops, -1)), scores.unflatten(0, (self._crops, -1))

    def _see(self, _: nn.Module, given: tuple[Tensor]) -> None:
        self._features = given[0].detach()

    def _take_features(self) -> Tensor:
        """Return the trunk's features [N, B, F] of the last forward pass, and hold them no longer."""
        features, self._features = self._features, None
        assert features is not None
        return features.view(self._crops, -1, features.shape[1])


def _own_queue(
    features: list[torch.Tensor], ranks: Ranks, *, saved: int, batch: int, length: int
) -> torch.Tensor:
    """This rank's part of the queues [A, length, D] of all ranks that saved.

    A queue is a row of batches, the newest first, and each rank holds its share of every batch; so the
    shares are put together batch by batch before they are divided among the ranks that there are now. Where
    the batch has another size now, the oldest embeddings fall out, or their place is empty for a while.
    """
    if len(features) == ranks.world_size and saved == batch:
        return features[ranks.rank]
    share, dim = saved // len(features), features[0].shape[2]
    by_batch = torch.cat([each.view(len(each), -1, share, dim) for each in features], dim=2)
    whole = by_batch.flatten(1, 2)
    want = length * ranks.world_size
    whole = torch.nn.functional.pad(whole[:, :want], (0, 0, 0, max(0, want - whole.shape[1])))
    return whole.view(len(whole), -1, batch, dim).chunk(ranks.world_size, dim=2)[ranks.rank].flatten(1, 2)
