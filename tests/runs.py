"""Runs `streamswav` as its users do: processes of their own, what they say, and what they leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, reduction, util
from pathlib import Path
from typing import Any, NamedTuple

import torch

from streamswav import cli, gang

COMMAND = str(Path(sys.executable).with_name("streamswav"))
TINY = {
    "crops.sizes": "[16, 8]",
    "crops.counts": "[2, 2]",
    "crops.scales": "[[0.3, 1.0], [0.1, 0.4]]",
    "model.trunk": "resnet10",
    "model.width": "0.125",
    "model.stem": "small",
    "model.head_hidden": "16",
    "model.embedding": "8",
    "swav.prototypes": "10",
    "swav.queue_length": "0",
    "stream.columns": "2",
    "stream.rows": "2",
    "stream.window": "8",
    "loader.workers": "0",
    "training.batch": "16",
    "training.threads": "1",
    "telemetry.port": "0",
    "telemetry.log_seconds": "0.0001",
}

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
MANY = 512  # above all descriptors that a process is started with
QUIET_PORTS = (20000, 32000)  # below those that Linux gives to connections

EMPTY: Mapping[str, str] = types.MappingProxyType({})

Event = dict[str, Any]


def arguments(*, tiny: Mapping[str, str] = TINY, **sections: Mapping[str, Any]) -> list[str]:
    """`arguments(stream={"urls": "x"})` is `pretrain --stream.urls x` on top of the tiny run's keys."""
    given = {f"{name}.{key}": str(value) for name, keys in sections.items() for key, value in keys.items()}
    return ["pretrain", *(part for key, text in {**tiny, **given}.items() for part in (f"--{key}", text))]


@dataclass(frozen=True)
class Outcome:
    """How a process ended and what it said. A negative code is the signal that ended it."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[Event]:
        """The lines of the log."""
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]

    @property
    def said(self) -> list[str]:
        """The lines on stderr that are not of the log."""
        return [line for line in self.err.splitlines() if not line.startswith("{")]

    def of(self, name: str) -> list[Event]:
        """The events of this name."""
        return [event for event in self.events if event["event"] == name]


class Running:
    """A process in a session, hence a process group, of its own."""

    def __init__(self, process: Script | Fork, output: tuple[Path, Path]) -> None:
        self._process, self._output = process, output
        self.pid = process.pid
        self._groups = {self.pid}

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def so_far(self) -> Outcome:
        """What the process has said until now; a line that is being written is left out."""
        out, err = (path.read_text() if path.is_file() else "" for path in self._output)
        return Outcome(self._process.poll() or 0, out, err[: err.rfind("\n") + 1])

    @property
    def ended(self) -> bool:
        """Whether the process is over."""
        return self._process.poll() is not None

    def wait_until(self, reached: Callable[[Outcome], object], seconds: float = 90) -> Outcome:
        """Wait for something in the output, and fail if the process ends before."""
        deadline = time.monotonic() + seconds
        while not reached(so_far := self.so_far()):
            assert self._process.poll() is None, f"it ended: {self.so_far().err[-3000:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {so_far.err[-3000:]}"
            time.sleep(0.005)
        return so_far

    def wait(self, seconds: float = 120) -> Outcome:
        """Wait for the end."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"no end within {seconds} s: {self.so_far().err[-3000:]}"
            time.sleep(0.01)
        return self.so_far()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to all its processes, as a terminal does at Ctrl-C."""
        self.members()
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def kill(self) -> None:
        """Send SIGKILL to all its processes: what happens to a pod that goes."""
        self.signal_group(signal.SIGKILL)
        self.wait()

    def members(self) -> list[Process]:
        """What runs in its process group and in those of its children."""
        found = processes()
        self._groups |= {each.group for each in found if each.parent in self._groups}
        return [each for each in found if each.group in self._groups]

    def ranks(self) -> list[int]:
        """Where this is a launcher: the processes of its ranks, in their order. Each leads its session."""
        return sorted(
            each.pid for each in self.members() if each.parent == self.pid and each.pid == each.group
        )

    def left_behind(self, seconds: float = 10) -> list[Process]:
        """What still runs of all that after so many seconds."""
        deadline = time.monotonic() + seconds
        while (members := self.members()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return members


class Script:
    """A command, as from a shell."""

    def __init__(
        self, command: Sequence[str], output: tuple[Path, Path], environment: Mapping[str, str]
    ) -> None:
        with output[0].open("wb") as out, output[1].open("wb") as err:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()


class Fork:
    """`enter` in a process that is forked from one that has imported torch; the rest is as in the script."""

    def __init__(
        self,
        arguments: Sequence[str],
        output: tuple[Path, Path],
        environments: Sequence[Mapping[str, str]],
        spares: int = 0,
        *,
        move: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["streamswav.commands.pretrain", "streamswav.launch"])
        given = (list(arguments), output, environments, spares, move)
        self._process = context.Process(target=_main, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode


def _main(
    arguments: list[str],
    output: tuple[Path, Path],
    environments: list[dict[str, str]],
    spares: int,
    move: Callable[[], None] | None,
) -> None:
    """Call `enter`; with several environments, in a process for each; `move` goes to its place first."""
    os.setsid()
    if move:
        move()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which commands respect
    for number, path in enumerate(output, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    if len(environments) > 1:
        children = [pid for environment in environments if (pid := _fork(arguments, environment))]
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
    os.environ.update(environments[0])
    if spares:
        waiting = [Spare() for _ in range(spares)]
        gang.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
            Popen=lambda *given, **named: waiting.pop(0).become(*given, **named), DEVNULL=subprocess.DEVNULL
        )
    sys.exit(_enter(arguments))


class Spare:
    """A child of a launcher that was forked from, in place of a rank that imports torch for itself.

    It is forked before the launcher has threads, and waits; `become` is `subprocess.Popen` for `Gang`: the
    process is the launcher's own child, in a session of its own, with this environment and no other.
    """

    def __init__(self) -> None:
        ours, self._pipe = os.pipe()
        launcher = os.getpid()
        if pid := os.fork():
            os.close(ours)
            self.pid = pid
            self.returncode: int | None = None
            return
        for number in POLITE:
            signal.signal(number, signal.SIG_IGN)  # as if it did not exist yet
        _die_with_parent(signal.SIGKILL)
        os.close(self._pipe)
        with os.fdopen(ours, "rb") as file:
            given = file.readline()
        if not given or os.getppid() != launcher:
            os._exit(0)
        os.setsid()
        for number in POLITE:
            signal.signal(number, signal.SIG_DFL)
        told = json.loads(given)
        os.environ.clear()
        os.environ.update(told["environment"])
        sys.exit(_enter(told["arguments"]))

    def become(self, command: Sequence[str], *, env: Mapping[str, str], **_: object) -> Spare:
        """Start the rank, and return once its session is its own."""
        assert list(command[1:3]) == ["-m", "streamswav"]
        with os.fdopen(self._pipe, "wb") as file:
            told = {"arguments": command[3:], "environment": dict(env)}
            file.write(json.dumps(told).encode() + b"\n")
        while os.getsid(self.pid) != self.pid:
            time.sleep(0.001)
        return self


def _fork(arguments: list[str], environment: dict[str, str]) -> int:
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    sys.exit(_enter(arguments))


def _enter(arguments: list[str]) -> int:
    """Call the command where the first fork server for loader processes is one that waits already."""
    util.spawnv_passfds = SpareServer(util.spawnv_passfds).spawn
    return cli.enter(arguments)


class SpareServer:
    """A child of a rank that was forked from, in place of a fork server that imports torch for itself.

    It is forked before the rank has threads, and waits; `spawn` stands in for multiprocessing's way to start
    such a server, and gives it what a new process would have: these descriptors and no others, environment,
    and signals, those blocked as well. A second server is a process of its own.
    """

    def __init__(self, otherwise: Callable[[str, list[str], list[int]], int]) -> None:
        self._otherwise = otherwise
        self._pipe, theirs = multiprocessing.Pipe()
        rank = os.getpid()
        if pid := os.fork():
            theirs.close()
            self._pid: int | None = pid
            return
        for number in POLITE:
            signal.signal(number, signal.SIG_IGN)  # as if it did not exist yet
        _die_with_parent(signal.SIGKILL)
        self._pipe.close()
        with contextlib.suppress(EOFError):
            if os.getppid() == rank:
                self._serve(theirs)
        os._exit(0)

    def spawn(self, path: str, arguments: list[str], descriptors: list[int]) -> int:
        """`multiprocessing.util.spawnv_passfds`."""
        if self._pid is None or "forkserver" not in arguments[-1]:
            return self._otherwise(path, arguments, descriptors)
        pid, self._pid = self._pid, None
        with self._pipe as pipe:
            pipe.send((arguments[-1], descriptors, dict(os.environ), signal.pthread_sigmask(0, [])))
            for each in descriptors:
                reduction.send_handle(pipe, each, pid)
        return pid

    @staticmethod
    def _serve(pipe: connection.Connection) -> None:
        code, numbers, environment, blocked = pipe.recv()
        given = [fcntl.fcntl(reduction.recv_handle(pipe), fcntl.F_DUPFD, MANY) for _ in numbers]
        pipe.close()
        os.closerange(3, MANY)
        for each, number in zip(given, numbers, strict=True):
            os.dup2(each, number)
            os.close(each)
        os.environ.clear()
        os.environ.update(environment)
        for each in POLITE:
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _die_with_parent(0)
        exec(code, {})


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def start(
    arguments: Sequence[str],
    folder: Path,
    *,
    script: bool = False,
    environment: Mapping[str, str] = EMPTY,
    terminal: Path | None = None,
) -> Running:
    """Start `streamswav`: the installed script, or seconds faster its `enter` in a forked process.

    What it says goes to files in `folder`, or to a terminal, which the caller reads.
    """
    output = (terminal, terminal) if terminal else _output(folder)
    if script:
        return Running(Script([COMMAND, *arguments], output, environment), output)
    return Running(Fork(arguments, output, [dict(environment)]), output)


def start_ranks(
    count: int,
    arguments: Sequence[str],
    folder: Path,
    *,
    launcher: Sequence[str] | None = None,
    script: bool = False,
    environment: Mapping[str, str] = EMPTY,
) -> Running:
    """Start `streamswav` on several ranks: under `streamswav launch` with these flags, or without it.

    As in `start`, launcher and ranks are forked unless the installed script is wanted, seconds slower.
    """
    output = _output(folder)
    if launcher is not None:
        command = ["launch", "--nproc-per-node", str(count), *launcher, *arguments]
        if script:
            return Running(Script([COMMAND, *command], output, environment), output)
        return Running(Fork(command, output, [dict(environment)], spares=2 * count), output)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost"}
    shared["MASTER_PORT"] = free_port()
    each = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    environments = [{name: str(value) for name, value in values.items()} for values in each]
    return Running(Fork(arguments, output, environments), output)


def _output(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "stdout", folder / "stderr"


def run(
    arguments: Sequence[str], folder: Path, *, script: bool = False, environment: Mapping[str, str] = EMPTY
) -> Outcome:
    """As `start`, to the end."""
    with start(arguments, folder, script=script, environment=environment) as running:
        return running.wait()


class Process(NamedTuple):
    """One of the machine's processes."""

    pid: int
    parent: int
    group: int
    command: str


def processes() -> list[Process]:
    """All processes that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                command = (folder / "cmdline").read_text().replace("\0", " ")
                found.append(Process(int(folder.name), int(parent), int(group), command))
    return found


def free_port() -> int:
    """A port that nobody listens on, and that no connection is given as its own end meanwhile."""
    for port in random.sample(range(*QUIET_PORTS), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports are taken")


def scrape_text(port: int) -> str:
    """What is at /metrics; empty where nobody answers, or the process ends while it does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text: str = reply.read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    return text


def values_of(text: str) -> dict[str, float]:
    """The values of a scrape by name and labels, as in the text: `streamswav_run_state{state="done"}`."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def newest(run_folder: Path) -> Path:
    """The folder of a run's newest checkpoint, as its pointer says."""
    checkpoints = run_folder / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


def state_of(run_folder: Path) -> dict[str, Any]:
    """Everything that a run has come to: tensors of network, optimizer and queue, and the position."""
    folder = newest(run_folder)
    loaded = {name: torch.load(folder / name, weights_only=True) for name in ("model.pt", "ranks.pt")}
    flat = {f"{name}/{key}": value for name, state in loaded.items() for key, value in _flat(state)}
    flat["position"] = json.loads((folder / "position.json").read_text())
    flat["run"] = json.loads((folder / "run.json").read_text())
    return flat


def _flat(state: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(state, Mapping):
        return [pair for key, value in state.items() for pair in _flat(value, f"{name}.{key}")]
    if isinstance(state, list | tuple):
        return [pair for index, value in enumerate(state) for pair in _flat(value, f"{name}.{index}")]
    return [(name, state)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names under which two states are not the same to the bit."""
    names = {*one, *other}
    return sorted(name for name in names if not _same(one.get(name), other.get(name)))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)
