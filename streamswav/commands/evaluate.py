"""`streamswav knn`, `linear` and `evaluate`: what a checkpoint's features are worth on labelled images."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress

from streamswav.config import Config, StorageSection
from streamswav.errors import DeniedError, NotFoundError
from streamswav.stream.store import Store
from streamswav.telemetry.progress import Reporter
from streamswav.transfer.evaluation import BASELINES, PROTOCOLS, evaluate
from streamswav.transfer.knn import KnnSettings
from streamswav.transfer.linear import LinearSettings
from streamswav.transfer.results import Results

_KNN = KnnSettings()
_LINEAR = LinearSettings()


def add_knn_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_knn`."""
    _add_common(parser)
    _add_knn(parser)


def add_linear_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_linear`."""
    _add_common(parser)
    _add_linear(parser)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_evaluate`."""
    _add_common(parser)
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="rows (default: all)"
    )
    _add_knn(parser)
    _add_linear(parser)


def run_knn(args: argparse.Namespace, *, given: Config) -> Results:
    """Measure by nearest neighbours; print a table, write JSON where asked.

    Args:
        args: parsed by a parser that `add_knn_arguments` prepared.
        given: fields of its `storage` that are set override those of the run's configuration.

    Raises:
        StreamswavError: as `streamswav.transfer.evaluation.evaluate`.
    """
    return _run(args, given.storage, protocols=("knn",), knn=_knn_settings(args))


def run_linear(args: argparse.Namespace, *, given: Config) -> Results:
    """Measure by a linear classifier; otherwise as `run_knn`."""
    return _run(args, given.storage, protocols=("linear",), linear=_linear_settings(args))


def run_evaluate(args: argparse.Namespace, *, given: Config) -> Results:
    """Measure by several protocols on the same features; otherwise as `run_knn`."""
    return _run(
        args, given.storage, protocols=args.protocols, knn=_knn_settings(args), linear=_linear_settings(args)
    )


def _run(
    args: argparse.Namespace,
    storage: StorageSection,
    *,
    protocols: Sequence[str],
    knn: KnnSettings = _KNN,
    linear: LinearSettings = _LINEAR,
) -> Results:
    if args.json and args.json != "-":
        _check_writable(args.json, Store(storage))
    results = evaluate(
        args.checkpoint,
        args.train,
        args.test,
        protocols=protocols,
        baselines=args.baselines,
        knn=knn,
        linear=linear,
        resize=args.resize,
        crop=args.crop,
        limit=args.limit,
        batch=args.batch,
        workers=args.workers,
        device=args.device,
        storage=storage,
        reporter=Reporter(),
    )
    table = sys.stderr if args.json == "-" else sys.stdout
    table.write(results.to_table() + "\n")
    if args.json == "-":
        sys.stdout.write(results.to_json() + "\n")
    elif args.json:
        Store(storage).write(args.json, results.to_json().encode())
    return results


def _check_writable(url: str, store: Store) -> None:
    """Write a probe and take it away again, since measuring takes long; what is there already stays.

    Raises:
        StorageError: nothing can be written there.
    """
    probe = f"{url}.probe"
    try:
        store.info(url)
    except NotFoundError:
        probe = url
    except DeniedError:
        pass  # who may write need not be allowed to read
    store.write(probe, b"")
    with suppress(DeniedError):
        store.delete(probe)


def _knn_settings(args: argparse.Namespace) -> KnnSettings:
    return KnnSettings(tuple(args.k) if args.k else None, tuple(args.temperature))


def _linear_settings(args: argparse.Namespace) -> LinearSettings:
    return LinearSettings(epochs=args.epochs, rate=args.rate, standardise=args.standardise, seed=args.seed)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, its checkpoints, or one step-*")
    add("--train", required=True, nargs="+", metavar="URL", help="labelled shards to learn from")
    add("--test", required=True, nargs="+", metavar="URL", help="labelled shards to classify")
    add("--baselines", nargs="*", choices=BASELINES, default=(), help="columns to compare with")
    add("--json", metavar="FILE", help="write the results there as JSON; - is standard output")
    add("--resize", type=_count, metavar="PIXELS", help="shorter side (default: from the crop)")
    add("--crop", type=_count, metavar="PIXELS", help="centre crop (default: the run's first crop size)")
    add("--limit", type=_count, metavar="IMAGES", help="use about so many of each set")
    add("--batch", type=_count, default=256, metavar="IMAGES", help="through the trunk at once")
    add("--workers", type=_whole, metavar="N", help="processes that decode; 0: none (default: the cores)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the trunk runs")


def _add_knn(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--k",
        nargs="+",
        type=_count,
        metavar="K",
        help="neighbours that vote (default: 20 200 where they fit)",
    )
    add("--temperature", nargs="+", type=_positive, default=_KNN.temperatures, help="of a vote's weight")


def _add_linear(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=_count, default=_LINEAR.epochs, help="over the training features")
    add("--rate", type=_positive, default=_LINEAR.rate, help="learning rate at the start")
    add("--standardise", action="store_true", help="bring every feature to mean 0 and variance 1")
    add("--seed", type=_whole, default=_LINEAR.seed, help="of the classifier's weights and order")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _count(text: str) -> int:
    number = _whole(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
