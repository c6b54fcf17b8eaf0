"""`streamswav wait`: end when a run is done, so that what follows it can begin."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from streamswav.commands.summary import SUMMARY_FILE
from streamswav.config import Config
from streamswav.drain import drain_on_signals
from streamswav.errors import DrainedError, UnavailableError
from streamswav.stream.store import Store, join, redact
from streamswav.telemetry.logs import own_log


def add_wait_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_wait`."""
    add = parser.add_argument
    add("directory", metavar="RUN", help="folder of the run, as its run.directory")
    add("--every", type=float, default=30.0, metavar="S", help="seconds between two looks (default: 30)")
    add("--config", type=Path, metavar="FILE", help="the run's configuration, for how storage is reached")


def run_wait(args: argparse.Namespace, *, given: Config) -> None:
    """Wait for the summary, which a run writes when it is done and not before.

    Args:
        args: parsed by a parser that `add_wait_arguments` prepared.
        given: its `storage` tells how the run's folder is reached.

    Raises:
        DrainedError: a signal came first.
        StreamswavError: as the store deserves; an outage is waited for.
    """
    place = join(args.directory, SUMMARY_FILE)
    store = Store(given.storage)
    with drain_on_signals() as drain:
        drain.patient = True
        own_log().tell("waiting", f"for {redact(place)}, which a run writes when it is done")
        until(lambda: _is_there(store, place), every=args.every, stop=drain)
    sys.stdout.write(f"{redact(args.directory)}: this run is done\n")


def until(done: Callable[[], bool], *, every: float, stop: Callable[[], bool]) -> None:
    """Look every so many seconds, and at signals in between.

    Raises:
        DrainedError: a signal came first.
    """
    while not done():
        deadline = time.monotonic() + every
        while (left := deadline - time.monotonic()) > 0 and not stop():
            time.sleep(min(left, 0.1))
        if stop():
            raise DrainedError("stopped by a signal before the run was done: the same command waits again")


def _is_there(store: Store, place: str) -> bool:
    try:
        return store.exists(place)
    except UnavailableError as error:
        own_log().tell("warning", f"{error}; looking again")
        return False
