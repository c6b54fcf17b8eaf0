"""What protocols have measured, as the values of results: names for people, settings for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from streamswav.transfer.measuring.heads import HeadSettings
from streamswav.transfer.measuring.knn import KnnSettings, Vote
from streamswav.transfer.measuring.linear import PROTOCOL, LinearMeasured, LinearSettings
from streamswav.transfer.measuring.precision import MeanPrecision
from streamswav.transfer.measuring.results import Accuracy, Measured, Value, to_value
from streamswav.transfer.measuring.svm import SvmMeasured, SvmSettings

_GRID = ("rates", "weight_decays", "validation")


def knn_values(
    column: str, found: Mapping[Vote, Accuracy | MeanPrecision], settings: KnnSettings, *, half: bool
) -> Iterator[Value]:
    """Yield a value for each k and temperature."""
    for vote, measured in found.items():
        name = f"kNN, k = {vote.k}"
        if len(settings.temperatures) > 1:
            name += f", T = {vote.temperature:g}"
        about = {
            **vote._asdict(),
            "similarity": "cosine",
            **({"training_features": "float16"} if half else {}),
        }
        yield to_value(name, about | _left_out(measured), column, measured)


def linear_values(column: str, measured: LinearMeasured, settings: LinearSettings) -> Iterator[Value]:
    """Yield the head that stands for all, if there is one, and with several heads every one.

    `linear` is the only head, or the one that held-out training images chose. The best one by the test images
    is named as that.
    """
    only = len(measured.heads) == 1
    head = next(iter(measured.heads)) if only else measured.chosen
    if head is not None:
        about = _of_head(head, settings)
        if measured.ranking:
            share = f"{100 * settings.held_out:g}% of the training images, held out"
            about |= {
                "chosen": f"of {len(measured.heads)} by {share}",
                "held_out_score": max(measured.ranking),
            }
        yield _linear("linear", about, column, measured.heads[head])
    if only:
        return
    best = measured.best
    name = f"linear, best of {len(measured.heads)} by the test images (optimistic)"
    yield _linear(name, _of_head(best, settings), column, measured.heads[best])
    for number, (each, figures) in enumerate(measured.heads.items()):
        about = _of_head(each, settings)
        if measured.ranking:
            about |= {"held_out_score": measured.ranking[number]}
        name = f"linear, rate {each.rate:g}, weight decay {each.weight_decay:g}"
        yield _linear(name, about, column, figures)


def svm_value(column: str, measured: SvmMeasured, settings: SvmSettings) -> Value:
    """Return accuracy and mean average precision of SVMs."""
    about = {
        "costs": settings.choose_from(multi=measured.accuracy is None),
        "folds": settings.folds,
        "seed": settings.seed,
        "chosen_costs": measured.costs,
        "features": "unit length",
        "unconverged_fits": measured.unconverged,
        "classes_not_learnt": measured.unlearnt,
    }
    return to_value("svm", about | _left_out(measured.precision), column, measured)


def _linear(name: str, about: dict[str, Any], column: str, figures: Accuracy | MeanPrecision) -> Value:
    return to_value(name, about | _left_out(figures), column, figures)


def _of_head(head: HeadSettings, settings: LinearSettings) -> dict[str, Any]:
    common = {name: value for name, value in asdict(settings).items() if name not in _GRID}
    return {**asdict(head), **common, "reported": "last epoch", "features": PROTOCOL}


def _left_out(measured: Measured) -> dict[str, int]:
    """Tell of classes without a positive test image, which have no average precision."""
    without = measured.without if isinstance(measured, MeanPrecision) else 0
    return {"classes_without_a_test_image": without} if without else {}
