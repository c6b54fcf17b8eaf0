"""A linear classifier on frozen features (paper, appendix A.3), on features that were computed once.

The paper draws a new random crop of every image in every epoch; here the features of one centre crop are
kept and used throughout. That costs one pass over the images instead of a hundred, and some accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamswav.transfer.results import Accuracy, measure_accuracy

PROTOCOL = "cached centre-crop features; the paper's protocol augments"

_ROWS_AT_ONCE = 8192
_PRODUCTS_FOR_THREADS = 1 << 25


@dataclass(frozen=True)
class LinearSettings:
    """How the classifier is trained; the defaults are the paper's.

    Attributes:
        epochs: over the training features.
        rate: learning rate of SGD at the start; it falls to 0 as a cosine.
        batch: images a step.
        weight_decay: L2 penalty.
        momentum: of SGD.
        standardise: shift and scale every feature to mean 0 and variance 1 over the training images.
        seed: of the initial weights and of the order.
    """

    epochs: int = 100
    rate: float = 0.3
    batch: int = 256
    weight_decay: float = 1e-6
    momentum: float = 0.9
    standardise: bool = False
    seed: int = 0


def measure_linear(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: LinearSettings,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Train a classifier and return its accuracy after the last epoch (not the best one's).

    Args:
        train: features [N, F].
        train_labels: classes [N], in 0 to C - 1.
        test: features [M, F].
        test_labels: classes [M]; one that is in no training image is never hit.
        classes: C.
        settings: of the optimizer.
        device: where it is trained.
    """
    if settings.standardise:
        deviation, mean = torch.std_mean(train, dim=0)
        deviation = deviation.clamp(min=1e-6)
        train, test = (train - mean) / deviation, (test - mean) / deviation
    classifier = train_linear(train, train_labels, classes=classes, settings=settings, device=device)
    with torch.no_grad():
        scores = torch.cat([classifier(rows.to(device)).cpu() for rows in torch.split(test, _ROWS_AT_ONCE)])
    return measure_accuracy(scores, test_labels)


def train_linear(
    features: Tensor, labels: Tensor, *, classes: int, settings: LinearSettings, device: torch.device | str
) -> nn.Linear:
    """Train a linear layer [C, F] on features [N, F] and labels [N] with softmax and cross-entropy."""
    generator = torch.Generator().manual_seed(settings.seed)
    classifier = _fresh(features.shape[1], classes, generator).to(device)
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=settings.rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    steps = settings.epochs * math.ceil(len(features) / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with _fitting_threads(settings.batch * classifier.weight.numel()):
        for _ in range(settings.epochs):
            order = torch.randperm(len(features), generator=generator)
            for rows in torch.split(order, settings.batch):
                loss = F.cross_entropy(classifier(features[rows].to(device)), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
                optimizer.step()
                schedule.step()
    return classifier


def _fresh(features: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Small weights and no bias."""
    layer = nn.Linear(features, classes)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=generator)
        layer.bias.zero_()
    return layer


@contextmanager
def _fitting_threads(products: int) -> Iterator[None]:
    """Keep small steps on one thread: there, waiting for one another costs threads more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if products < _PRODUCTS_FOR_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
