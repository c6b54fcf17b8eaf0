"""Finetuning as a task: labelled crops in, trunk and head moved by cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from streamswav.crops import Augment
from streamswav.loader import Batch
from streamswav.training.learner import Learner, StepResult
from streamswav.training.pace import Stride
from streamswav.transfer.finetuning.mixing import Mixing
from streamswav.transfer.finetuning.network import FinetuneNetwork


class SupervisedLearner(Learner):
    """Trunk, heads and optimizer.

    Args:
        network: a `FinetuneNetwork`, wrapped in DistributedDataParallel where there are several ranks.
        optimizer: over what of it is trained.
        label_smoothing: share of the target that is spread over all classes.
        scaler: loss scaling, for float16.
        autocast: type of the forward pass; None: the parameters'.
    """

    def __init__(
        self,
        network: FinetuneNetwork | DistributedDataParallel,
        optimizer: Optimizer,
        *,
        label_smoothing: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, optimizer, scaler=scaler, autocast=autocast)
        self._label_smoothing = label_smoothing

    @property
    def module(self) -> FinetuneNetwork:
        """The network without its wrapper."""
        return cast("FinetuneNetwork", super().module)

    def step(self, images: Tensor, targets: Tensor, *, rate: float) -> tuple[StepResult, Tensor]:
        """Take one optimizer step. Nothing is read from the device.

        Args:
            images: float [B, 3, S, S].
            targets: class numbers [B], or shares of classes [B, C].
            rate: learning rate, which each group scales.

        Returns:
            What it came to, the loss being the mean over the heads, and the scores [H, B, C].
        """
        self._undo.remember()
        scores = self._forward(images)
        loss = self.module.head.loss(scores, targets, label_smoothing=self._label_smoothing)
        self._backward(loss)
        self.clock.enter("optimizer")
        grad_norm, skipped = self._update(rate)
        self._undo.where(skipped)
        return StepResult(loss.detach() / len(scores), grad_norm, skipped), scores.detach()

    def rehearse(self, images: Tensor) -> None:
        """Run one backward pass and discard it, as pretraining does: a resumed run then sums in one order."""
        with self._buffers_kept():
            self._backward(self._forward(images).mean())
            self.optimizer.zero_grad()

    def _forward(self, images: Tensor) -> Tensor:
        """Return scores [H, B, C] in float32."""
        with self._forward_pass():
            scores: Tensor = self.network(images)
        return scores.float()


class Finetuning:
    """Supervised training on labelled crops as what a trainer trains.

    Args:
        learner: takes the steps.
        augment: of the crops, on the device.
        mixing: of images and targets.
        classes: C.
        multi: an image may have several labels.
        device: where the learner's network is.
    """

    def __init__(
        self,
        learner: SupervisedLearner,
        augment: Augment,
        mixing: Mixing,
        *,
        classes: int,
        multi: bool,
        device: torch.device,
    ) -> None:
        self.learner = learner
        self._augment, self._mixing, self._device = augment, mixing, device
        self._classes, self._multi = classes, multi
        self._unwatched: tuple[Tensor, Tensor] | None = None
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def subject(self) -> nn.Module:
        """The network: images [B, 3, S, S] to scores [H, B, C]."""
        return self.learner.module

    def to_device(self, batch: Batch) -> list[Tensor]:
        """Move crops and labels to the device, and augment the crops there."""
        (pixels,), labels = batch.pixels, batch.labels
        assert labels is not None, "the feed was given labels"
        images = self._augment(pixels.to(self._device, non_blocking=True), batch.parameters)
        return [images, labels.to(self._device, non_blocking=True)]

    def step(self, tensors: Sequence[Tensor], stride: Stride) -> StepResult:
        """Take one optimizer step. Nothing is read from the device."""
        images, labels = tensors
        targets = labels
        if self._mixing.active:
            shares = (
                labels.clamp(min=0) if self._multi else nn.functional.one_hot(labels, self._classes).float()
            )
            images, targets = self._mixing(images, shares, seen=stride.images)
        result, scores = self.learner.step(images, targets, rate=stride.rate)
        self._unwatched = scores[0], labels
        return result

    def watch(self) -> None:
        """Count which images of the last step were classified right."""
        if self._unwatched is not None and not self._multi:
            # Of mixed images the one whose label counts is the batch's own.
            scores, labels = self._unwatched
            self._right += (scores.argmax(dim=1) == labels).sum()
            self._seen += len(labels)
        self._unwatched = None

    def settled(self, skipped: Sequence[bool]) -> None:
        """Nothing beside the weights depends on which steps counted."""

    def readings(self) -> Mapping[str, float]:
        """Return the share of images since the last time that were classified right, before their step."""
        if self._multi:
            return {}
        seen = max(1, int(self._seen))
        right = float(self._right) / seen
        self._right.zero_()
        self._seen.zero_()
        return {"train_accuracy_ratio": right}
