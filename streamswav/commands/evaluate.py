"""`streamswav knn`, `linear`, `svm` and `evaluate`: what a trunk's features are worth on labelled images."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch

from streamswav.arguments import count, whole
from streamswav.config import Config
from streamswav.drain import drain_on_signals
from streamswav.errors import ConfigError, DeniedError, NotFoundError
from streamswav.stream.store import Store
from streamswav.telemetry.progress import Reporter
from streamswav.training.distributed import join_ranks, leader_tells, own_heartbeat
from streamswav.training.watchdog import Watchdog
from streamswav.transfer.measuring.baselines import BASELINES
from streamswav.transfer.measuring.evaluation import PROTOCOLS, Wanted, evaluate
from streamswav.transfer.measuring.knn import KnnSettings
from streamswav.transfer.measuring.linear import LinearSettings
from streamswav.transfer.measuring.results import Results
from streamswav.transfer.measuring.svm import SvmSettings

_KNN = KnnSettings()
_LINEAR = LinearSettings()
_SVM = SvmSettings()
_BY_DEFAULT = Wanted().protocols


def add_knn_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_knn`."""
    _add_common(parser)
    _add_knn(parser)
    parser.add_argument("--half", action="store_true", help="hold the training features in float16")


def add_linear_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_linear`."""
    _add_common(parser)
    _add_linear(parser)
    _add_seed(parser)


def add_svm_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_svm`."""
    _add_common(parser)
    _add_svm(parser)
    _add_seed(parser)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_evaluate`."""
    _add_common(parser)
    default = " ".join(_BY_DEFAULT)
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=_BY_DEFAULT, help=f"rows (default: {default})"
    )
    _add_knn(parser)
    _add_linear(parser)
    _add_svm(parser)
    _add_seed(parser)


def run_knn(args: argparse.Namespace, *, given: Config) -> Results | None:
    """Measure by nearest neighbours; print a table, write JSON where asked.

    Args:
        args: parsed by a parser that `add_knn_arguments` prepared.
        given: fields of its `storage` that are set override those of the run's configuration; `labels` tells
            where labels come from, `watchdog` how long nothing may happen.

    Returns:
        What was found, on rank 0; None on the others.

    Raises:
        StreamswavError: as `streamswav.transfer.measuring.evaluation.evaluate`.
    """
    return _run(args, given, protocols=("knn",), knn=_knn_settings(args), half=args.half)


def run_linear(args: argparse.Namespace, *, given: Config) -> Results | None:
    """Measure by linear classifiers; otherwise as `run_knn`."""
    return _run(args, given, protocols=("linear",), linear=_linear_settings(args))


def run_svm(args: argparse.Namespace, *, given: Config) -> Results | None:
    """Measure by linear SVMs; otherwise as `run_knn`."""
    return _run(args, given, protocols=("svm",), svm=_svm_settings(args))


def run_evaluate(args: argparse.Namespace, *, given: Config) -> Results | None:
    """Measure by several protocols on the same features; otherwise as `run_knn`."""
    return _run(
        args,
        given,
        protocols=tuple(each for each in PROTOCOLS if each in args.protocols),
        knn=_knn_settings(args),
        linear=_linear_settings(args),
        svm=_svm_settings(args),
    )


def _run(
    args: argparse.Namespace,
    given: Config,
    *,
    protocols: Sequence[str],
    knn: KnnSettings = _KNN,
    linear: LinearSettings = _LINEAR,
    svm: SvmSettings = _SVM,
    half: bool = False,
) -> Results | None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "there is no CUDA device here", value=args.device)
    wanted = Wanted(
        protocols=protocols,
        baselines=args.baselines,
        knn=knn,
        linear=linear,
        svm=svm,
        resize=args.resize,
        crop=args.crop,
        limit=args.limit,
        batch=args.batch,
        workers=args.workers,
        features=args.features,
        half=half,
    )
    store = Store(given.storage)
    with ExitStack() as stack:
        drain = stack.enter_context(drain_on_signals())
        drain.patient = True  # it is asked at every batch
        watchdog = Watchdog(given.watchdog, own_heartbeat())  # the launcher looks, if there is one
        ranks = stack.enter_context(join_ranks(args.device))
        stack.enter_context(leader_tells(ranks))
        if args.json and args.json != "-":
            ranks.lead(lambda: _check_writable(args.json, store))

        def stop() -> bool:
            watchdog.enter("evaluation")
            return drain()

        stop()
        results = evaluate(
            args.checkpoint,
            args.train,
            args.test,
            wanted,
            command=args.command if hasattr(args, "command") else protocols[0],
            storage=given.storage,
            labels=given.labels,
            ranks=ranks,
            reporter=Reporter(silent=not ranks.leads),
            stop=stop,
        )
        if results is not None:
            _tell(results, args.json, store)
    return results


def _tell(results: Results, file: str | None, store: Store) -> None:
    table = sys.stderr if file == "-" else sys.stdout
    table.write(results.to_table() + "\n")
    if file == "-":
        sys.stdout.write(results.to_json() + "\n")
    elif file:
        store.write(file, results.to_json().encode())


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
    return KnnSettings(
        tuple(dict.fromkeys(args.k)) if args.k else None, tuple(dict.fromkeys(args.temperature))
    )


def _linear_settings(args: argparse.Namespace) -> LinearSettings:
    return LinearSettings(
        epochs=args.epochs,
        rates=tuple(args.rate),
        weight_decays=tuple(args.weight_decay),
        standardise=args.standardise,
        validation=args.validation,
        seed=args.seed,
    )


def _svm_settings(args: argparse.Namespace) -> SvmSettings:
    return SvmSettings(tuple(args.costs) if args.costs else None, seed=args.seed)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, one of its checkpoints, or a weight file")
    add("--train", required=True, nargs="+", metavar="URL", help="labelled shards to learn from")
    add("--test", required=True, nargs="+", metavar="URL", help="labelled shards to classify")
    add("--baselines", nargs="*", choices=BASELINES, default=(), help="columns to compare with")
    add("--json", metavar="FILE", help="write the results there as JSON; - is standard output")
    add(
        "--features",
        default="",
        metavar="DIR",
        help="keep features there, and go on with those that are there",
    )
    add("--resize", type=count, metavar="PIXELS", help="shorter side (default: from the crop)")
    add("--crop", type=count, metavar="PIXELS", help="centre crop (default: the run's first crop size)")
    add("--limit", type=count, metavar="IMAGES", help="use about so many of each set")
    add("--batch", type=count, default=256, metavar="IMAGES", help="through the trunk at once")
    add("--workers", type=whole, metavar="N", help="processes that decode; 0: none (default: the cores)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the trunk runs")


def _add_knn(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--k",
        nargs="+",
        type=count,
        metavar="K",
        help="neighbours that vote (default: 20 200 where they fit)",
    )
    add(
        "--temperature",
        nargs="+",
        type=_positive,
        default=_KNN.temperatures,
        metavar="T",
        help="of a vote's weight (default: 0.1)",
    )


def _add_linear(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=count, default=_LINEAR.epochs, help="over the training features (default: 100)")
    add(
        "--rate",
        nargs="+",
        type=_positive,
        default=_LINEAR.rates,
        help="learning rates at the start, each trained beside the others (default: 0.3)",
    )
    add(
        "--weight-decay",
        nargs="+",
        type=_not_negative,
        default=_LINEAR.weight_decays,
        metavar="DECAY",
        help="each with each rate (default: 1e-6)",
    )
    add(
        "--validation",
        type=_share,
        metavar="SHARE",
        help="of the training images that chooses a head (default: 0.1 for several heads; 0: none)",
    )
    add("--standardise", action="store_true", help="bring every feature to mean 0 and variance 1")


def _add_svm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--costs",
        nargs="+",
        type=_positive,
        metavar="COST",
        help="that cross-validation tries (default: 0.01 to 100, of several labels an image to 1000)",
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=whole, default=_LINEAR.seed, help="of weights, orders, folds and what is held out"
    )


def _number(what: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not holds(number):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return number

    return read


_positive = _number("a number above 0", lambda number: 0 < number < math.inf)
_not_negative = _number("a number from 0 on", lambda number: 0 <= number < math.inf)
_share = _number("a share from 0 to below 1", lambda number: 0 <= number < 1)
