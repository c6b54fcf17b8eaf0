"""The command `streamswav doctor`: arguments in, lines or JSON out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from streamswav.commands.audit_checks import count
from streamswav.config import Config
from streamswav.doctor.case import Case
from streamswav.doctor.catalogue import CHECKS
from streamswav.doctor.finding import NO_CONFIGURATION
from streamswav.doctor.report import Report, line, say, without_configuration
from streamswav.doctor.running import THREAD, Check, exit_code, run_checks
from streamswav.errors import EXIT_RETRY, ConfigError, StreamswavError
from streamswav.launch_options import LaunchOptions, add_flags, read_options
from streamswav.planning import find_gpu

SECONDS = 5.0

Given = TypeVar("Given")

_FLAGS = ("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port", "rdzv_id", "dns_seconds")
_EPILOG = """\
Keys of the configuration, and the flags that say where the ranks are, are given as for the command itself;
PET_* and the like are read from the environment, as by `streamswav launch`.

exit codes: 0 nothing failed · 78 something that a restart cannot mend · 75 only what waiting mends (storage
out of reach, a name that is not yet known)
"""


def add_arguments(parser: argparse.ArgumentParser, *, commands: Sequence[str]) -> None:
    """Declare what `doctor` takes beside the configuration."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.usage = "streamswav doctor [options] [--section.key value]..."
    add, names = parser.add_argument, [check.name for check in CHECKS]
    add("--config", type=Path, metavar="FILE", help="YAML file with sections and keys")
    add("--init", metavar="PATH", help="--model.init: weights that a new run begins with, or scratch")
    add(
        "--for",
        dest="for_command",
        choices=commands,
        default="pretrain",
        metavar="COMMAND",
        help=f"what will be run: {', '.join(commands)} (default: pretrain)",
    )
    add("--json", action="store_true", help="print JSON")
    add("--strict", action="store_true", help="a warning counts as a failure")
    add("--only", nargs="+", choices=names, metavar="CHECK", help=f"only these: {', '.join(names)}")
    add("--skip", nargs="+", choices=names, metavar="CHECK", default=[], help="all but these")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help=f"how long the loader is measured; 0: not (default: {SECONDS:g})",
    )
    add("--gpu", metavar="TYPE", help="type of the GPUs, where this machine has none (as for plan)")
    add("--images", type=int, help=argparse.SUPPRESS)  # so that a command's own arguments may follow --for
    add_flags(parser)


def run_doctor(
    arguments: argparse.Namespace, environment: Mapping[str, str], read_config: Callable[[], Config]
) -> int:
    """Run the checks that are asked for, print what they find, and return the exit code.

    Raises:
        ConfigError: an argument that cannot be understood.
    """
    if arguments.seconds < 0:
        raise ConfigError("--seconds", "must not be negative", value=arguments.seconds)
    if arguments.keys and not arguments.keys[0].startswith("-"):
        reason = "takes no command as a word: leave it out for pretrain, or say --for COMMAND"
        raise ConfigError("doctor", reason, value=arguments.keys[0])
    case = Case(
        command=arguments.for_command,
        given=_or_error(read_config),
        launch=_or_error(lambda: _read_launch(arguments, environment)),
        environment=environment,
        seconds=arguments.seconds,
        gpu_type=None if arguments.gpu is None else find_gpu(arguments.gpu),
    )
    report = Report(case.command, environment)
    with _quiet_storage():
        for result in run_checks(_chosen(arguments), case):
            clean = report.add(result)
            if not arguments.json and not without_configuration(clean):
                say(line(clean))
    if not arguments.json and (left := sum(map(without_configuration, report.results))):
        say(f"skip  {count(left, 'check')}: {NO_CONFIGURATION}")
    code = exit_code(report.results, strict=arguments.strict)
    if code == EXIT_RETRY and isinstance(case.launch, LaunchOptions):
        code = case.launch.retry_code
    say(report.to_json(code) if arguments.json else report.summary(code))
    _leave_abandoned(code)
    return code


@contextlib.contextmanager
def _quiet_storage() -> Iterator[None]:
    """Keep warnings of storage that is asked in vain from the output: the finding has them."""
    logger = logging.getLogger("streamswav.stream.store")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _chosen(arguments: argparse.Namespace) -> list[Check]:
    return [
        check
        for check in CHECKS
        if (arguments.only is None or check.name in arguments.only) and check.name not in arguments.skip
    ]


def _read_launch(arguments: argparse.Namespace, environment: Mapping[str, str]) -> LaunchOptions:
    flags = {name: getattr(arguments, name) for name in _FLAGS}
    if arguments.gpu is not None and flags["nnodes"] is not None and flags["master_addr"] is None:
        # Elsewhere, where this is asked about, the pods know their numbers and who is the first.
        flags |= {"node_rank": "0", "master_addr": "localhost"}
    return read_options(flags, environment)


def _or_error(read: Callable[[], Given]) -> Given | StreamswavError:
    try:
        return read()
    except StreamswavError as error:
        return error


def _leave_abandoned(code: int) -> None:
    """End at once where a check still waits for something: at its exit Python would wait for it too."""
    if any(thread.name.startswith(THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)
