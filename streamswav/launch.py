"""`streamswav launch`: PID 1 of a pod, or the start of several ranks on a workstation."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from streamswav.config import Config
from streamswav.errors import (
    EXIT_FAILED,
    EXIT_RETRY,
    ConfigError,
    DrainedError,
    PeerError,
    StreamswavError,
)
from streamswav.gang import Gang, Stop, say
from streamswav.heartbeat import AGENT
from streamswav.launch_options import LaunchOptions, parse_launch
from streamswav.pod import Pod, linger
from streamswav.telemetry.exporter import Source, serve
from streamswav.telemetry.logs import own_log

_TRAINING = ("pretrain", "cooldown", "finetune")
_LOOK_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 10.0
_STOPPED = "stopped by a signal before the ranks were started: the same command begins again"


def launch(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    commands: Sequence[str],
    check: Callable[[Sequence[str]], Config],
) -> int:
    """Start ranks of a command, and return the exit code that their ends amount to.

    Args:
        arguments: flags, then the command.
        environment: of this process.
        commands: names of those that can have ranks.
        check: returns the configuration of a command, or refuses one that cannot work.

    Raises:
        ConfigError: a flag, a variable, or the command's configuration; or the port of the metrics is in use.
    """
    options, command = parse_launch(arguments, environment)
    if command[0] not in commands:
        reason = f"has no ranks; launch is for {', '.join(commands)}"
        raise ConfigError("launch", reason, value=command[0])
    telemetry = check(command).telemetry
    # What only measures has no metrics: its launcher serves those of the pod where that is asked for.
    port = telemetry.port if command[0] in _TRAINING or "port" in telemetry.model_fields_set else 0
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    pod = Pod(options.node)
    source = Source(pod.metrics, status=pod.status, ready=pod.ready)
    with serve(source, port=port, bind=telemetry.bind) as endpoint, _listening() as stop:
        try:
            code = _run(options, command, environment, stop, pod)
        except StreamswavError as error:
            own_log().fail(str(error), error.exit_code)
            code = error.exit_code
        pod.end(code, stop)
        linger(endpoint, telemetry.linger_seconds, stop)
    return options.retry_code if code == EXIT_RETRY else code


def _run(
    options: LaunchOptions, command: Sequence[str], environment: Mapping[str, str], stop: Stop, pod: Pod
) -> int:
    """Start the ranks, again and again where that was asked for, and return how it ended."""
    if options.address is not None:
        _await_name(options.address, options.dns_seconds, stop)
    ranks = count_ranks(options.ranks)
    for attempt in range(options.max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="streamswav-", ignore_cleanup_errors=True) as folder:
            gang = Gang(
                [sys.executable, "-m", "streamswav", *command],
                options,
                ranks=ranks,
                stop=stop,
                environment=environment,
                folder=Path(folder),
                attempt=attempt,
                on_end=pod.ended,
            )
            pod.begin(gang, Path(folder), attempt)
            code = _run_gang(gang, stop)
            pod.keep_status()
        if code != EXIT_FAILED or stop.asked or attempt == options.max_restarts:
            break
        say(f"restart {attempt + 1} of {options.max_restarts}: all ranks go on from the last checkpoint")
    return code


def _run_gang(gang: Gang, stop: Stop) -> int:
    """Run the agent in a thread: it waits in C for other nodes, where no signal would be heard."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            gang.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=AGENT, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
        if not stop.asked:
            continue
        with gang.starting:
            begun, over = bool(gang.members), not gang.running
        if not begun:
            raise DrainedError(_STOPPED)
        if over:
            break
    if raised and not gang.members:
        error = raised[0]
        if isinstance(error, RuntimeError):  # the store was lost while the ranks were numbered
            raise PeerError(f"another node is gone before the ranks were started ({_first_line(error)})")
        raise error
    if raised:
        say(f"the agent failed: {_first_line(raised[0])}")
        return gang.outcome() or EXIT_FAILED
    return gang.outcome()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _listening() -> Iterator[Stop]:
    """Hear the signals that ask for a stop; PID 1 gets none that it has no handler for."""
    stop = Stop()
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays unheard
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop.hear) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop.asked else handler)


def _await_name(name: str, seconds: float, stop: Stop) -> None:
    """Wait until the machine's name is known: in a cluster its record may come after this pod.

    Raises:
        DrainedError: a signal came.
        PeerError: it is not known in time.
    """
    deadline, pause = time.monotonic() + seconds, 0.25
    while True:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                reason = error.strerror or error
                raise PeerError(
                    f"{name} (--master-addr): no such name within {seconds:g} s: {reason}"
                ) from None
        else:
            return
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        _sleep(min(left, random.uniform(pause / 2, pause)), stop)  # noqa: S311


def _sleep(seconds: float, stop: Stop) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if stop.asked:
            raise DrainedError(_STOPPED)
        time.sleep(min(left, _LOOK_SECONDS))


def count_ranks(text: str) -> int:
    """Return the number of ranks on this machine.

    Raises:
        ConfigError: its GPUs are wanted, and there are none.
    """
    gpus = torch.cuda.device_count()
    if text == "auto":
        return gpus or 1
    if text == "gpu" and not gpus:
        raise ConfigError(
            "--nproc-per-node", "no CUDA device is visible here; use auto, cpu or a number", value=text
        )
    named = {"gpu": gpus, "cpu": len(os.sched_getaffinity(0))}
    return named[text] if text in named else int(text)
