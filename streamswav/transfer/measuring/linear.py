"""Linear classifiers on frozen features (paper, appendix A.3), on features that were computed once.

The paper draws a new random crop of every image in every epoch; here the features of one centre crop are
kept and used throughout. That costs one pass over the images instead of a hundred, and some accuracy. A whole
grid of rates and weight decays is trained side by side on the same batches.

What is reported is always the last epoch's. Of a grid, one head is chosen without looking at the test images:
a share of the training images is held out, all heads are trained on the rest and ranked by the held-out ones.
Then all are trained on all training images, and every one is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from streamswav.errors import ConfigError
from streamswav.transfer.measuring.heads import HeadBank, HeadSettings
from streamswav.transfer.measuring.precision import MeanPrecision, measure_precision, quick_mean
from streamswav.transfer.measuring.results import Accuracy, Hits, count_hits

PROTOCOL = "cached centre-crop features; the paper's protocol augments"

_ROWS_AT_ONCE = 8192
_PRODUCTS_FOR_THREADS = 1 << 25
_HELD_OUT = 0.1


@dataclass(frozen=True)
class LinearSettings:
    """How the classifiers are trained; the defaults are the paper's.

    Attributes:
        epochs: over the training features.
        rates: learning rates of SGD at the start; each falls to 0 as a cosine.
        batch: images a step.
        weight_decays: L2 penalties; each is combined with each rate.
        momentum: of SGD.
        standardise: shift and scale every feature to mean 0 and variance 1 over the training images.
        seed: of the initial weights, of the order, and of what is held out.
        validation: share of the training images that is held out to choose a head; None: 0.1 where there are
            several, else 0.
    """

    epochs: int = 100
    rates: tuple[float, ...] = (0.3,)
    batch: int = 256
    weight_decays: tuple[float, ...] = (1e-6,)
    momentum: float = 0.9
    standardise: bool = False
    seed: int = 0
    validation: float | None = None

    @property
    def heads(self) -> tuple[HeadSettings, ...]:
        """Every rate with every weight decay."""
        pairs = product(dict.fromkeys(self.rates), dict.fromkeys(self.weight_decays))
        return tuple(HeadSettings(*each) for each in pairs)

    @property
    def held_out(self) -> float:
        """Share of the training images by which a head is chosen; 0: none is."""
        if self.validation is None:
            return _HELD_OUT if len(self.heads) > 1 else 0.0
        return self.validation


@dataclass(frozen=True)
class LinearMeasured:
    """What a grid of heads gave.

    Attributes:
        heads: what each gave on the test images after the last epoch, in the order of the settings.
        chosen: the head that was best on held-out training images; None where none were.
        ranking: accuracy, or mean average precision, of each head on these; empty where none were.
    """

    heads: dict[HeadSettings, Accuracy | MeanPrecision]
    chosen: HeadSettings | None
    ranking: tuple[float, ...] = ()

    @property
    def best(self) -> HeadSettings:
        """The head that is best on the test images: an optimistic choice. Of equal ones the first."""
        return max(self.heads, key=lambda head: next(iter(self.heads[head].scores.values())))


def measure_linear(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: LinearSettings,
    device: torch.device | str = "cpu",
    alive: Callable[[], object] = lambda: None,
) -> LinearMeasured:
    """Train classifiers and measure each after the last epoch (not its best one).

    Args:
        train: features [N, F].
        train_labels: classes [N], in 0 to C - 1; or of multi-label images [N, C]: 1, 0, or -1 (not counted).
        test: features [M, F].
        test_labels: classes [M], of which one that is in no training image is never hit; or [M, C].
        classes: C.
        settings: of the optimizer, and the grid.
        device: where they are trained.
        alive: called after every epoch.

    Raises:
        ConfigError: there are too few training images to hold some out.
    """
    if settings.standardise:
        deviation, mean = torch.std_mean(train, dim=0)
        deviation = deviation.clamp(min=1e-6)
        train, test = (train - mean) / deviation, (test - mean) / deviation

    def fit(features: Tensor, labels: Tensor) -> HeadBank:
        return train_linear(features, labels, classes=classes, settings=settings, device=device, alive=alive)

    ranking: tuple[float, ...] = ()
    if settings.held_out:
        kept, held = _hold_out(len(train), settings)
        ranking = _rank(fit(train[kept], train_labels[kept]), train[held], train_labels[held])
    bank = fit(train, train_labels)
    chosen = settings.heads[ranking.index(max(ranking))] if ranking else None
    return LinearMeasured(
        dict(zip(settings.heads, _measure(bank, test, test_labels), strict=True)), chosen, ranking
    )


def train_linear(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    settings: LinearSettings,
    device: torch.device | str,
    alive: Callable[[], object] = lambda: None,
) -> HeadBank:
    """Train all heads on features [N, F] and labels [N] with softmax and cross-entropy.

    With labels [N, C] of 0, 1 and -1 every class is a logistic regression of its own.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    bank = HeadBank(features.shape[1], classes, settings.heads, seed=generator, multi=labels.dim() == 2)
    bank = bank.to(device)
    optimizer = torch.optim.SGD(bank.parameter_groups(), momentum=settings.momentum)
    steps = settings.epochs * math.ceil(len(features) / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with _fitting_threads(settings.batch * sum(head.weight.numel() for head in bank.layers)):
        for _ in range(settings.epochs):
            order = torch.randperm(len(features), generator=generator)
            for rows in torch.split(order, settings.batch):
                loss = bank.loss(bank(features[rows].to(device)), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
                optimizer.step()
                schedule.step()
            alive()
    return bank


def _hold_out(images: int, settings: LinearSettings) -> tuple[Tensor, Tensor]:
    """Return which training images are kept and which held out, from the seed."""
    if images < 2:
        raise ConfigError("--validation", f"there are only {images} training images", value=settings.held_out)
    held = min(images - 1, max(1, round(images * settings.held_out)))
    order = torch.randperm(images, generator=torch.Generator().manual_seed(settings.seed))
    return order[held:].sort().values, order[:held].sort().values


def _rank(bank: HeadBank, features: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Return what each head gets right of held-out images."""
    if bank.multi:
        return tuple(quick_mean(scores, labels) for scores in _all_scores(bank, features))
    return tuple(each.top1 for each in _accuracies(bank, features, labels))


def _measure(bank: HeadBank, features: Tensor, labels: Tensor) -> list[Accuracy] | list[MeanPrecision]:
    if bank.multi:
        return [measure_precision(scores, labels) for scores in _all_scores(bank, features)]
    return _accuracies(bank, features, labels)


def _accuracies(bank: HeadBank, features: Tensor, labels: Tensor) -> list[Accuracy]:
    """Return every head's; the scores of all heads are held for a part of the images only."""
    hits = [Hits() for _ in bank.layers]
    parts = zip(_scores(bank, features), torch.split(labels, _rows_at_once(bank)), strict=True)
    for scores, wanted in parts:
        hits = [before + count_hits(own, wanted) for before, own in zip(hits, scores, strict=True)]
    return [each.accuracy for each in hits]


def _all_scores(bank: HeadBank, features: Tensor) -> Tensor:
    return torch.cat(list(_scores(bank, features)), dim=1)


@torch.no_grad()
def _scores(bank: HeadBank, features: Tensor) -> Iterator[Tensor]:
    """Yield scores [H, n, C] of some images after the other, on the CPU."""
    device = bank.layers[0].weight.device
    for rows in torch.split(features, _rows_at_once(bank)):
        yield bank(rows.to(device)).cpu()


def _rows_at_once(bank: HeadBank) -> int:
    return max(1, _ROWS_AT_ONCE // len(bank.layers))


@contextmanager
def _fitting_threads(products: int) -> Iterator[None]:
    """Keep small steps on one thread: there, waiting for one another costs threads more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if products < _PRODUCTS_FOR_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
