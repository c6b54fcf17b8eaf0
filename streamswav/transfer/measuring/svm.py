"""Linear SVMs on frozen features, one a class against the rest, by scikit-learn's LIBLINEAR.

Images of several labels (VOC07): as in the benchmarks of Goyal et al., Scaling and benchmarking
self-supervised visual representation learning (2019). Features of unit length, squared hinge loss, positives
weigh twice; the cost of each class is the one of best average precision in cross-validation over three folds
of the training images; then the class is learnt from all of them. A label of -1 (VOC's "difficult") is a
negative in training and not counted in the test.

Images of one class: one cost for all classes, by the accuracy in cross-validation, all images weigh the same.

LIBLINEAR solves the primal problem here, whose steps use no random numbers. For each feature of each training
image it holds 16 bytes in every thread at work, beside 8 that all share.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from streamswav.errors import ConfigError
from streamswav.transfer.measuring.intervals import Interval
from streamswav.transfer.measuring.precision import MeanPrecision, average_precision, measure_precision
from streamswav.transfer.measuring.results import Accuracy, measure_accuracy

Array = NDArray[np.float64]
Answer = TypeVar("Answer")

_COSTS_MULTI = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
_COSTS_SINGLE = (0.01, 0.1, 1.0, 10.0, 100.0)
_POSITIVE_WEIGHT = 2.0
_MOST_ITERATIONS = 2000
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class SvmSettings:
    """How SVMs are trained.

    Attributes:
        costs: that are tried; None: for images of several labels those of the VOC07 practice (0.01 to 1000),
            else 0.01 to 100.
        folds: of the cross-validation.
        seed: of the folds.
    """

    costs: tuple[float, ...] | None = None
    folds: int = 3
    seed: int = 0

    def choose_from(self, *, multi: bool) -> tuple[float, ...]:
        """Return the costs, growing."""
        return tuple(sorted(set(self.costs or (_COSTS_MULTI if multi else _COSTS_SINGLE))))


@dataclass(frozen=True)
class SvmMeasured:
    """What SVMs gave.

    Attributes:
        precision: mean average precision over the classes.
        accuracy: of the class with the best score; None for images of several labels.
        costs: that were chosen: one for all classes, or each class's.
        unconverged: fits that LIBLINEAR ended before its tolerance.
        unlearnt: classes without a positive or a negative in training, which score 0 everywhere.
    """

    precision: MeanPrecision
    accuracy: Accuracy | None
    costs: tuple[float, ...]
    unconverged: int
    unlearnt: int

    @property
    def scores(self) -> dict[str, float]:
        """Shares by metric."""
        return {**(self.accuracy.scores if self.accuracy else {}), **self.precision.scores}

    @property
    def intervals(self) -> dict[str, Interval]:
        """Intervals by metric."""
        return {**(self.accuracy.intervals if self.accuracy else {}), **self.precision.intervals}


def check_svm() -> None:
    """Refuse to begin where scikit-learn is missing.

    Raises:
        ConfigError: it is.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("svm", "needs scikit-learn: pip install 'streamswav[evaluate]'")


def measure_svm(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    settings: SvmSettings,
    threads: int = 0,
    alive: Callable[[], object] = lambda: None,
) -> SvmMeasured:
    """Choose costs by cross-validation, train, and measure.

    Args:
        train: features [N, F]; brought to unit length.
        train_labels: classes [N], in 0 to C - 1; or of multi-label images [N, C]: 1, 0, or -1.
        test: features [M, F].
        test_labels: classes [M], of which one that is in no training image is never hit; or [M, C].
        classes: C.
        settings: costs and folds.
        threads: that fit at once; 0: one a core. Each gives the same.
        alive: called every second or so.

    Raises:
        ConfigError: scikit-learn is missing, or there are too few training images for the folds.
    """
    check_svm()
    if len(train) < settings.folds:
        reason = f"there are only {len(train)} training images for {settings.folds} folds"
        raise ConfigError("svm", reason)
    multi = train_labels.dim() == 2
    images, asked = _unit(train), _unit(test)
    fits = _Fits(threads or len(os.sched_getaffinity(0)), alive)
    costs = settings.choose_from(multi=multi)
    labels = train_labels.numpy()
    if multi:
        chosen, scores, unlearnt = _by_class(images, labels > 0, asked, costs, settings=settings, fits=fits)
        return SvmMeasured(measure_precision(scores, test_labels), None, chosen, fits.unconverged, unlearnt)
    cost, scores = _all_classes(images, labels, asked, costs, settings=settings, fits=fits, classes=classes)
    wanted = test_labels[:, None] == torch.arange(classes)
    return SvmMeasured(
        measure_precision(scores, wanted.to(torch.int8)),
        measure_accuracy(scores, test_labels),
        (cost,),
        fits.unconverged,
        0,
    )


class _Fits:
    """Runs fits in threads (LIBLINEAR lets go of Python's lock) and counts those that did not converge."""

    def __init__(self, threads: int, alive: Callable[[], object]) -> None:
        self._threads, self._alive = threads, alive
        self.unconverged = 0

    def all(self, works: Sequence[Callable[[], tuple[Answer, bool]]]) -> list[Answer]:
        """Return the answer of each; each also tells whether it converged."""
        with warnings.catch_warnings():  # of the whole process, hence not in the threads
            warnings.filterwarnings("ignore", message="Liblinear failed to converge")
            pool = ThreadPoolExecutor(self._threads)
            try:
                found = [pool.submit(work) for work in works]
                self._await(found)
            finally:
                pool.shutdown(cancel_futures=True)
        answers = [each.result() for each in found]
        self.unconverged += sum(not converged for _, converged in answers)
        return [answer for answer, _ in answers]

    def _await(self, found: Sequence[Future[Any]]) -> None:
        left = set(found)
        while left:
            left = wait(left, _LOOK_SECONDS).not_done
            self._alive()


def _by_class(
    images: Array,
    present: NDArray[np.bool_],
    asked: Array,
    costs: tuple[float, ...],
    *,
    settings: SvmSettings,
    fits: _Fits,
) -> tuple[tuple[float, ...], Tensor, int]:
    """Return for images of several labels every class's cost, test scores [M, C], and classes not learnt."""
    learnt = [each for each in range(present.shape[1]) if 0 < present[:, each].sum() < len(images)]
    folds = {each: list(_folds(present[:, each], settings)) for each in learnt}
    tasks = [(each, cost, fold) for each in learnt for cost in costs for fold in folds[each]]

    def validate(task: tuple[int, float, NDArray[np.bool_]]) -> tuple[float, bool]:
        number, cost, held = task
        scores, converged = _fit_one(images[~held], present[~held, number], images[held], cost)
        truth = torch.from_numpy(present[held, number])
        return average_precision(torch.from_numpy(scores), truth.to(torch.int8))[0], converged

    found = fits.all([lambda task=task: validate(task) for task in tasks])  # type: ignore[misc]
    by_cost: dict[tuple[int, float], list[float]] = {}
    for (number, cost, _), precision in zip(tasks, found, strict=True):
        by_cost.setdefault((number, cost), []).append(precision)
    chosen = {each: _best(costs, [by_cost.get((each, cost), []) for cost in costs]) for each in learnt}
    columns = fits.all(
        [lambda each=each: _fit_one(images, present[:, each], asked, chosen[each]) for each in learnt]  # type: ignore[misc]
    )
    scores = torch.zeros(len(asked), present.shape[1], dtype=torch.float64)
    for each, column in zip(learnt, columns, strict=True):
        scores[:, each] = torch.from_numpy(column)
    every = tuple(chosen.get(each, 0.0) for each in range(present.shape[1]))
    return every, scores, present.shape[1] - len(learnt)


def _all_classes(
    images: Array,
    labels: NDArray[np.int64],
    asked: Array,
    costs: tuple[float, ...],
    *,
    settings: SvmSettings,
    fits: _Fits,
    classes: int,
) -> tuple[float, Tensor]:
    """Return for images of one class the cost and test scores [M, C]."""
    tasks = [(cost, fold) for cost in costs for fold in _folds(labels, settings)]

    def validate(cost: float, held: NDArray[np.bool_]) -> tuple[float, bool]:
        scores, converged = _fit_all(images[~held], labels[~held], images[held], cost, classes=classes)
        right = measure_accuracy(torch.from_numpy(scores), torch.from_numpy(labels[held]))
        return right.top1, converged

    found = fits.all([lambda task=task: validate(*task) for task in tasks])  # type: ignore[misc]
    by_cost = {
        cost: [share for (own, _), share in zip(tasks, found, strict=True) if own == cost] for cost in costs
    }
    cost = _best(costs, [by_cost[each] for each in costs])
    (scores,) = fits.all([lambda: _fit_all(images, labels, asked, cost, classes=classes)])
    return cost, torch.from_numpy(scores)


def _folds(labels: NDArray[Any], settings: SvmSettings) -> Iterator[NDArray[np.bool_]]:
    """Yield which images each fold holds out: of every class the same share, from the seed.

    A fold without which some class would be missing, or that has none of it, tells nothing and is left out.
    """
    random = np.random.default_rng(settings.seed)
    fold = np.empty(len(labels), np.int64)
    begin = 0
    for value in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == value))
        fold[own] = (begin + np.arange(len(own))) % settings.folds
        begin += len(own)
    for number in range(settings.folds):
        held = fold == number
        if len(np.unique(labels[~held])) > 1 and held.any():
            yield held


def _best(costs: Sequence[float], found: Sequence[Sequence[float]]) -> float:
    """Return the cost of the best mean, of equal ones the smallest; without any the one in the middle."""
    means = [fmean(each) if each else -1.0 for each in (_numbers(values) for values in found)]
    return costs[means.index(max(means))] if max(means) >= 0 else costs[len(costs) // 2]


def _numbers(values: Sequence[float]) -> list[float]:
    """Leave out the precision of a fold without a positive, which is no number."""
    return [value for value in values if not math.isnan(value)]


def _fit_one(images: Array, present: NDArray[np.bool_], asked: Array, cost: float) -> tuple[Array, bool]:
    """Learn one class against the rest; return scores [M], and whether it converged."""
    svm = _build(cost, {1: _POSITIVE_WEIGHT, 0: 1.0}).fit(images, present.astype(np.int64))
    return svm.decision_function(asked), _converged(svm)


def _fit_all(
    images: Array, labels: NDArray[np.int64], asked: Array, cost: float, *, classes: int
) -> tuple[Array, bool]:
    """Learn every class against the rest; return scores [M, C], -inf for classes that are not there."""
    scores = np.full((len(asked), classes), -np.inf)
    there = np.unique(labels)
    if len(there) == 1:
        scores[:, there] = 0.0
        return scores, True
    svm = _build(cost, None).fit(images, labels)
    found = svm.decision_function(asked)
    scores[:, there] = np.stack([-found, found], axis=1) if len(there) == 2 else found
    return scores, _converged(svm)


def _build(cost: float, weights: dict[int, float] | None) -> Any:
    from sklearn.svm import LinearSVC  # noqa: PLC0415 - an optional dependency

    return LinearSVC(C=cost, class_weight=weights, dual=False, max_iter=_MOST_ITERATIONS)


def _converged(svm: Any) -> bool:
    return bool(np.max(svm.n_iter_) < _MOST_ITERATIONS)


def _unit(features: Tensor) -> Array:
    unit: Array = F.normalize(features.double(), dim=1).numpy()
    return unit
