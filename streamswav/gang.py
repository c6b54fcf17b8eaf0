"""The ranks of one machine: started, watched and ended as one, under torch's elastic agent.

The agent brings the nodes together and numbers the ranks. The processes are our own: torch's would be sent
SIGKILL 30 s after the first has ended, whatever the others save, and their exit codes would be lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from streamswav.ends import count_memory_kills, reason_of_end
from streamswav.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RETRY,
    DrainedError,
)
from streamswav.heartbeat import (
    FOLDER_VARIABLE,
    STACKS_SIGNAL,
    Beat,
    Heartbeat,
    describe_hang,
    make_files,
    stacks_file,
)
from streamswav.launch_options import LaunchOptions
from streamswav.meeting import Meeting
from streamswav.telemetry.logs import own_log

EXIT_INTERRUPTED = 130

# A rank whose peer crashed learns of it within milliseconds; what is stuck elsewhere has nothing to save.
_PEER_SECONDS = 10.0
# Before its first step is done a rank has nothing to save, but may wait in C for others and hear no signal.
_STARTUP_GRACE_SECONDS = 15.0
_BARRIER_SECONDS = 60
_STACKS_SECONDS = 3.0
_STACKS_PAUSE_SECONDS = 0.1
_STARTUP_SECONDS = 1800.0
_UNTRACKED = "ignore:resource_tracker"
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def say(text: str, **fields: Any) -> None:
    """Tell one line, as the event `launcher`."""
    own_log().tell("launcher", text, **fields)


class Stop:
    """What the launcher's signals ask for.

    Attributes:
        asked: SIGTERM, SIGINT or SIGHUP has come: the ranks are to save and end.
        now: a second SIGINT has come.
    """

    def __init__(self) -> None:
        self.asked = self.now = False

    def hear(self, number: int, _: object) -> None:
        """Handle a signal."""
        self.now = self.now or (self.asked and number == signal.SIGINT)
        self.asked = True


@dataclass
class Member:
    """A rank's process.

    Attributes:
        code: how it ended, negative for a signal; None: it runs.
        ended_by_us: it was sent SIGKILL by its launcher.
        reason: why it ended, in a word.
    """

    rank: int
    local_rank: int
    process: subprocess.Popen[bytes]
    heartbeat: Heartbeat
    started: float
    code: int | None = None
    ended_by_us: bool = False
    reason: str = ""

    @property
    def beat(self) -> Beat:
        """Where it is; a rank that has not said so yet is starting."""
        beat = self.heartbeat.read()
        return beat if beat.phase else Beat(self.started, _STARTUP_SECONDS, "startup")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the rank alone: its loader processes end with it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self, reason: str) -> None:
        """End it at once, for this reason if it has none of its own."""
        self.ended_by_us, self.reason = True, self.reason or reason
        self.send(signal.SIGKILL)


class Gang(SimpleElasticAgent):
    """Starts the ranks of this machine and ends when all have.

    Args:
        command: what every rank runs.
        options: where the ranks are.
        ranks: how many are on this machine.
        stop: what the launcher's signals ask for.
        environment: of the ranks, beside what makes them ranks.
        folder: for what launcher and ranks share.
        attempt: restarts so far.
        on_end: hears why each rank ended, in a word.

    Attributes:
        members: the ranks; empty until all launchers have come.
        hung: the watchdog ended them.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: LaunchOptions,
        *,
        ranks: int,
        stop: Stop,
        environment: Mapping[str, str],
        folder: Path,
        attempt: int = 0,
        on_end: Callable[[str], None] = lambda _: None,
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=ranks,
            rdzv_handler=Meeting(options),
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=0,
            monitor_interval=0.05,
        )
        super().__init__(spec, exit_barrier_timeout=_BARRIER_SECONDS)
        self._command, self._options, self._stop = command, options, stop
        self._environment, self._folder, self._attempt = environment, folder, attempt
        self._on_end, self._memory_kills = on_end, count_memory_kills()
        self.members: list[Member] = []
        self.hung = False
        self.starting = threading.Lock()
        self._deadline: float | None = None
        self._drained_at: float | None = None
        self._suspect: tuple[Member, Beat] | None = None

    @property
    def running(self) -> list[Member]:
        """The ranks that have not ended."""
        return [member for member in self.members if member.code is None]

    def outcome(self) -> int:
        """Return the exit code that the ranks' ends amount to, with 75 for whatever may be started again."""
        if self._stop.now:
            return EXIT_INTERRUPTED
        if self.hung:
            return EXIT_RETRY
        codes = {self._meaning(member) for member in self.members}
        if EXIT_CONFIG in codes:
            return EXIT_CONFIG
        if codes - {EXIT_DONE, EXIT_RETRY, None}:
            return EXIT_FAILED
        return EXIT_DONE if codes == {EXIT_DONE} else EXIT_RETRY

    def _meaning(self, member: Member) -> int | None:
        """A rank's own exit code; None where this launcher ended it."""
        if member.ended_by_us:
            return None
        politely = member.code is not None and -member.code in _POLITE
        return EXIT_RETRY if politely and self._stop.asked else member.code

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self.starting:
            if self._stop.asked:
                raise DrainedError("stopped by a signal before the ranks were started")
            self.members = [self._start(worker, worker_group) for worker in worker_group.workers]
        return {member.local_rank: member.process.pid for member in self.members}

    def _start(self, worker: Worker, group: WorkerGroup) -> Member:
        heartbeat = make_files(self._folder, worker.local_rank)
        ours = {
            "RANK": worker.global_rank,
            "LOCAL_RANK": worker.local_rank,
            "WORLD_SIZE": worker.world_size,
            "LOCAL_WORLD_SIZE": group.spec.local_world_size,
            "GROUP_RANK": group.group_rank,
            "GROUP_WORLD_SIZE": group.group_world_size,
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": group.master_port,
            "TORCHELASTIC_RUN_ID": self._options.run_id,
            "TORCHELASTIC_RESTART_COUNT": self._attempt,
            "TORCHELASTIC_MAX_RESTARTS": self._options.max_restarts,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            FOLDER_VARIABLE: self._folder,
            # Semaphores of a rank that was killed are cleared up by Python without a word.
            "PYTHONWARNINGS": ",".join(filter(None, (self._environment.get("PYTHONWARNINGS"), _UNTRACKED))),
        }
        environment = {**self._environment, **{name: str(value) for name, value in ours.items()}}
        # A session of its own: what a terminal or a `kill` of the launcher's group sends reaches the rank
        # once, through the launcher.
        process = subprocess.Popen(  # noqa: S603 - it is this program
            self._command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        return Member(worker.global_rank, worker.local_rank, process, heartbeat, time.monotonic())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._reap()
        if self.running:
            self._drain()
            self._end_bereaved()
            self._look_for_hangs()
            return RunResult(state=WorkerState.HEALTHY)
        if all(member.code == EXIT_DONE for member in self.members):
            values = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
        return RunResult(state=WorkerState.FAILED)

    def _reap(self) -> None:
        """Take leave of all children that ended; where this is PID 1, orphans are among them."""
        by_pid = {member.process.pid: member for member in self.running}
        while by_pid:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if member := by_pid.get(pid):
                member.code = member.process.returncode = os.waitstatus_to_exitcode(status)
                self._tell_end(member)
                self._count_end(member)

    def _count_end(self, member: Member) -> None:
        code, killed = member.code or 0, count_memory_kills() > self._memory_kills
        member.reason = member.reason or reason_of_end(
            self._folder, member.local_rank, code, out_of_memory=killed
        )
        self._on_end(member.reason)

    def _tell_end(self, member: Member) -> None:
        code, meaning = member.code, self._meaning(member)
        if code is None or meaning in (None, EXIT_DONE, EXIT_RETRY, EXIT_CONFIG):
            return  # the rank has said why, or this launcher has
        if code >= 0:
            say(f"rank {member.rank} ended with exit code {code}", rank=member.rank, exit_code=code)
            return
        name = signal.Signals(-code).name
        memory = ": the machine, or the pod, may be out of memory" if -code == signal.SIGKILL else ""
        text = f"rank {member.rank} (process {member.process.pid}) was killed by {name}{memory}"
        say(text, rank=member.rank, signal=name)

    def _drain(self) -> None:
        """Pass a signal on once, and give the ranks time to save."""
        if self._stop.now:
            self._kill("interrupted again: the ranks are ended at once", reason="signal")
        elif self._stop.asked and self._drained_at is None:
            self._drained_at = time.monotonic()
            for member in self.running:
                member.send(signal.SIGTERM)
        elif self._drained_at is not None:
            waited = time.monotonic() - self._drained_at
            starting = all(member.beat.phase == "startup" for member in self.running)
            if starting and waited > _STARTUP_GRACE_SECONDS:
                self._kill(
                    "the ranks are ended: they had not begun, and have nothing to save", reason="signal"
                )
            elif waited > self._options.grace_seconds:
                self._end_with_stacks(
                    f"the ranks did not end within {self._options.grace_seconds:g} s of a signal "
                    "(--grace-seconds): they are ended, and what came after the last checkpoint is lost"
                )

    def _end_bereaved(self) -> None:
        """End the ranks soon where one of them crashed; where one has drained, give the others time.

        One that writes a checkpoint brings that to its end, within the watchdog's limit.
        """
        codes = [self._meaning(member) for member in self.members if member.code is not None]
        if not any(codes):
            return
        patience = self._options.grace_seconds if set(codes) <= {EXIT_DONE, EXIT_RETRY} else _PEER_SECONDS
        if self._deadline is None:
            self._deadline = time.monotonic() + patience
        self._deadline = min(self._deadline, time.monotonic() + patience)
        if time.monotonic() > self._deadline:
            self._kill(spare="checkpoint")

    def _look_for_hangs(self) -> None:
        """End a gang whose rank has been in one phase for too long, at two looks in succession."""
        late = [(member, beat) for member in self.running if (beat := member.beat).overdue]
        if not late:
            self._suspect = None
            return
        first = min(late, key=lambda each: each[1].since)
        if first != self._suspect:
            self._suspect = first
            return
        member, beat = first
        member.reason = "hang"
        self._end_with_stacks(f"{describe_hang(beat, member.rank)}; the ranks of this machine are ended")

    def _end_with_stacks(self, why: str) -> None:
        """Tell why, then every rank's stacks, and end the ranks; they may be started again."""
        running = self.running
        if self.hung or not running:
            return
        self.hung = True
        say(why)
        for member in running:
            # One that was stopped has to go on to answer.
            member.send(STACKS_SIGNAL)
            member.send(signal.SIGCONT)
        deadline = time.monotonic() + _STACKS_SECONDS
        for member in running:
            self._tell_stacks(member, deadline)
        self._kill()

    def _tell_stacks(self, member: Member, deadline: float) -> None:
        """Tell the stacks of a rank's threads once it has written them all, or what there is by then."""
        file = stacks_file(self._folder, member.local_rank)
        before, size = -1, 0
        while time.monotonic() < deadline and not 0 < size == before:
            time.sleep(_STACKS_PAUSE_SECONDS)
            before, size = size, file.stat().st_size
        text = file.read_text(errors="replace").strip() or "(no answer: it is stuck in the kernel)"
        where = f"rank {member.rank} (process {member.process.pid}), in {member.beat.phase}"
        say(where, rank=member.rank, stacks=text)

    def _kill(self, why: str = "", *, spare: str = "", reason: str = "peer") -> None:
        """End the ranks at once, but those that are in the phase to be spared; told why, and in a word."""
        running = [member for member in self.running if not member.ended_by_us]
        if running and why:
            say(why)
        for member in running:
            if not spare or member.beat.phase != spare:
                member.kill(reason)

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self._kill()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._kill()
