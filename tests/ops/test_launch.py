"""`streamswav launch`: what it starts, how it ends, and what it does to ranks that are killed or hang."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from runs import COMMAND, arguments, free_port, newest, start_ranks

from streamswav import gang
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_RETRY
from streamswav.heartbeat import Beat, make_files
from streamswav.launch_options import LaunchOptions

COUNTS = [25, 14, 31]
BATCH = 16
MANY = 200


@pytest.fixture(scope="module")
def command(make_shards, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    make_shards(shards, counts=COUNTS)

    def build(directory, *, passes=MANY, workers=0, **sections):
        return arguments(
            run={"directory": directory},
            stream={"urls": shards, "passes": passes, "samples": sum(COUNTS)},
            loader={"workers": workers},
            checkpoint={"images": 2 * BATCH},
            **sections,
        )

    return build


def saved_after(step):
    return lambda so_far: any(event["step"] >= step for event in so_far.of("checkpoint"))


def told(outcome):
    """What the launcher says, and with which errors ranks and launcher end."""
    said = [line.removeprefix("streamswav: ") for line in outcome.said if line.startswith("streamswav: ")]
    return [event["message"] for event in outcome.of("launcher")] + said


def test_a_rank_that_is_killed_is_named_and_all_go_on_from_the_last_checkpoint(command, tmp_path):
    given = command(tmp_path / "run", passes=3)
    with start_ranks(2, given, tmp_path / "out", launcher=["--max-restarts", "1"]) as running:
        running.wait_until(saved_after(2))
        os.kill(running.ranks()[1], signal.SIGKILL)
        outcome = running.wait()
        assert running.left_behind() == []
    assert outcome.code == EXIT_DONE, outcome.err[-4000:]
    (killed,) = (event for event in outcome.of("launcher") if event.get("signal") == "SIGKILL")
    assert re.search(r"rank 1 \(process \d+\) was killed by SIGKILL: .* out of memory", killed["message"])
    assert "restart 1 of 1: all ranks go on from the last checkpoint" in told(outcome)
    (resumed,) = outcome.of("resumed")
    assert resumed["step"] >= 2
    stream = json.loads((tmp_path / "run" / "summary.json").read_text())["stream"]
    assert stream["trained"] + stream["left"] == 3 * sum(COUNTS)


def test_without_restarts_left_a_killed_rank_is_a_failure_and_its_peers_end_soon(command, tmp_path):
    with start_ranks(2, command(tmp_path / "run"), tmp_path / "out", launcher=[]) as running:
        running.wait_until(saved_after(2))
        os.kill(running.ranks()[0], signal.SIGKILL)
        outcome = running.wait(30)
        assert running.left_behind() == []
    assert outcome.code == EXIT_FAILED
    assert "Traceback" not in outcome.err
    lines = told(outcome)
    assert any(line.startswith("rank 0 (process") for line in lines), outcome.err[-4000:]
    assert any(line.startswith("rank 1 lost the other ranks") for line in lines), outcome.err[-4000:]


def test_what_must_not_be_restarted_is_told_once_and_not_restarted(command, tmp_path):
    with start_ranks(1, command(tmp_path / "run", passes=1), tmp_path / "first", launcher=[]) as running:
        assert running.wait().code == EXIT_DONE
    other = command(tmp_path / "run", passes=2, model={"embedding": 4})
    with start_ranks(2, other, tmp_path / "second", launcher=["--max-restarts", "3"]) as running:
        outcome = running.wait()
    assert outcome.code == EXIT_CONFIG
    (line,) = told(outcome)
    assert "model.embedding" in line


def test_signals_to_all_processes_drain_once_and_end_with_the_retry_code(command, tmp_path):
    given = command(tmp_path / "run", workers=1)
    flags = ["--retry-code", "143"]
    with start_ranks(2, given, tmp_path / "out", launcher=flags, script=True) as running:
        running.wait_until(saved_after(2))
        running.signal_group(signal.SIGTERM)
        running.signal_group(signal.SIGTERM)
        outcome = running.wait(60)
        assert running.left_behind() == []
    assert outcome.code == 143, outcome.err[-4000:]
    assert outcome.of("checkpoint")[-1]["step"] == outcome.of("progress")[-1]["step"]
    (line,) = told(outcome)
    assert "the same command continues" in line


def test_a_signal_before_the_first_step_ends_all_ranks_for_another_try(command, tmp_path):
    with start_ranks(2, command(tmp_path / "run"), tmp_path / "out", launcher=[]) as running:
        running.wait_until(lambda _: len(running.ranks()) == 2)
        running.signal(signal.SIGHUP)
        assert running.wait(60).code == EXIT_RETRY
        assert running.left_behind() == []


@pytest.mark.all
def test_a_second_interrupt_ends_ranks_that_do_not_drain(command, tmp_path):
    with start_ranks(2, command(tmp_path / "run"), tmp_path / "out", launcher=[]) as running:
        running.wait_until(saved_after(2))
        for pid in running.ranks():
            os.kill(pid, signal.SIGSTOP)
        running.signal(signal.SIGINT)
        with pytest.raises(AssertionError, match="no end within"):
            running.wait(1)
        running.signal(signal.SIGINT)
        outcome = running.wait(30)
        assert running.left_behind() == []
    assert outcome.code == 130
    assert told(outcome) == ["interrupted again: the ranks are ended at once"]


@pytest.mark.all
def test_ranks_that_do_not_save_in_time_are_ended_with_their_stacks(command, tmp_path):
    given = command(tmp_path / "run")
    with start_ranks(2, given, tmp_path / "out", launcher=["--grace-seconds", "0.5"]) as running:
        running.wait_until(saved_after(2))
        os.kill(running.ranks()[0], signal.SIGSTOP)
        running.signal(signal.SIGTERM)
        outcome = running.wait(60)
    assert outcome.code == EXIT_RETRY
    assert "the ranks did not end within 0.5 s of a signal (--grace-seconds)" in outcome.err


def test_ranks_end_with_their_launcher(command, tmp_path):
    with start_ranks(2, command(tmp_path / "run"), tmp_path / "out", launcher=[]) as running:
        running.wait_until(saved_after(2))
        assert len(running.members()) >= 3
        running.signal(signal.SIGKILL)
        running.wait()
        assert running.left_behind() == []


def test_a_hung_gang_is_ended_with_the_stacks_of_all_ranks(command, tmp_path):
    given = command(tmp_path / "run", watchdog={"step_seconds": 2})
    with start_ranks(2, given, tmp_path / "out", launcher=["--max-restarts", "3"]) as running:
        running.wait_until(saved_after(2))
        os.kill(running.ranks()[1], signal.SIGSTOP)
        outcome = running.wait(60)
        assert running.left_behind() == []
    assert outcome.code == EXIT_RETRY, outcome.err[-4000:]
    assert re.search(r"rank \d hangs: \d+ s in step \(watchdog.step_seconds = 2\)", outcome.err)
    stacks_of = {each["rank"]: each["stacks"] for each in outcome.of("launcher") if "stacks" in each}
    for rank in (0, 1):
        stacks = stacks_of[rank]
        assert "most recent call first" in stacks
        assert "trainer.py" in stacks


@pytest.fixture
def member(tmp_path):
    """A rank that has entered a step long ago and sleeps; it knows nothing of a run."""
    beat = make_files(tmp_path, 0)
    program = f"""
import pathlib, time
from streamswav.heartbeat import Beat, attach, find_heartbeat
folder = pathlib.Path({str(tmp_path)!r})
attach(folder, 0)
find_heartbeat(folder, 0).write(Beat(1.0, 1.0, "step"))
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    while not beat.read().phase:
        assert process.poll() is None
        time.sleep(0.01)
    yield gang.Member(0, 0, process, beat, started=0.0)
    process.kill()
    process.wait()


def gang_of(folder, *members):
    launcher = {"options": LaunchOptions(), "stop": gang.Stop(), "environment": {}, "folder": folder}
    whole = gang.Gang(["-"], ranks=len(members), **launcher)
    whole.members = list(members)
    return whole


@pytest.mark.timeout(60)
def test_stacks_are_told_as_soon_as_they_are_written(member, monkeypatch, tmp_path, capsys):
    """With no limit on the wait, what else ends it?"""
    monkeypatch.setattr(gang, "_STACKS_SECONDS", 1e6)
    hung = gang_of(tmp_path, member)
    hung._look_for_hangs()
    hung._look_for_hangs()  # at two looks in succession
    assert member.process.wait() == -signal.SIGKILL
    assert "most recent call first" in capsys.readouterr().err
    assert hung.outcome() == EXIT_RETRY


def test_a_rank_that_writes_a_checkpoint_is_not_ended_with_its_peer(member, monkeypatch, tmp_path):
    monkeypatch.setattr(gang, "_PEER_SECONDS", -1)
    crashed = gang.Member(1, 1, member.process, member.heartbeat, started=0.0, code=-signal.SIGSEGV)
    bereaved = gang_of(tmp_path, member, crashed)
    member.heartbeat.write(Beat(1.0, 0.0, "checkpoint"))
    bereaved._end_bereaved()
    assert not member.ended_by_us
    member.heartbeat.write(Beat(1.0, 0.0, "step"))
    bereaved._end_bereaved()
    assert member.process.wait() == -signal.SIGKILL
    assert bereaved.outcome() == EXIT_FAILED


def two_nodes(command, folder, *, ranks=1):
    port = str(free_port())
    for node in (0, 1):
        flags = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_MASTER_PORT": port}
        environment = {**flags, "PET_MASTER_ADDR": "localhost"}
        yield start_ranks(ranks, command, folder / str(node), launcher=[], environment=environment)


def test_a_signal_to_one_node_drains_all_and_another_number_of_nodes_goes_on(command, tmp_path):
    one, other = two_nodes(command(tmp_path / "run"), tmp_path / "first")
    with one, other:
        one.wait_until(saved_after(2))
        other.signal(signal.SIGTERM)
        assert (one.wait(60).code, other.wait(60).code) == (EXIT_RETRY, EXIT_RETRY), one.so_far().err[-3000:]
        assert one.left_behind() == other.left_behind() == []
    step = int(newest(tmp_path / "run").name.split("-")[1].split(".")[0])
    passes = (step * BATCH) // sum(COUNTS) + 2
    one, other = two_nodes(command(tmp_path / "run", passes=passes), tmp_path / "second")
    with one, other:
        assert one.wait().code == other.wait().code == EXIT_DONE, one.so_far().err[-3000:]
    assert one.so_far().of("resumed")[0]["step"] == step


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.all)])
def test_a_node_whose_peer_is_lost_ends_by_itself(lost, command, tmp_path):
    nodes = list(two_nodes(command(tmp_path / "run"), tmp_path))
    with nodes[0], nodes[1]:
        nodes[0].wait_until(saved_after(2))
        nodes[lost].signal_group(signal.SIGKILL)
        outcome = nodes[1 - lost].wait(30)
        assert nodes[1 - lost].left_behind() == []
    assert outcome.code == EXIT_RETRY
    assert any(line.startswith(f"rank {1 - lost} lost the other ranks") for line in told(outcome))
    assert "Traceback" not in outcome.err


def launched(*given, environment=None):
    """The end of a launcher that gets no further than to its ranks."""
    done = subprocess.run(
        [COMMAND, "launch", *given, "pretrain", "--telemetry.port", "0"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    return done.returncode, done.stderr


def test_a_name_that_is_never_known_is_waited_for_and_named():
    flags = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "node-0.nowhere.invalid"}
    code, said = launched("--dns-seconds", "1", environment=flags)
    assert code == EXIT_RETRY
    assert said.startswith("streamswav: node-0.nowhere.invalid (--master-addr): no such name within 1 s")


@pytest.mark.parametrize(("node", "says"), [("0", "not all 2 nodes came"), ("1", "node 0 did not answer")])
def test_a_node_that_never_comes_is_waited_for_so_long(node, says):
    port = str(free_port())
    flags = ["--nnodes", "2", "--node-rank", node, "--master-addr", "localhost", "--master-port", port]
    code, said = launched(*flags, "--join-seconds", "1")
    assert code == EXIT_RETRY
    (line,) = said.splitlines()
    assert says in line


STUCK = {
    "asleep": ("time.sleep(60)", EXIT_RETRY, "rank 0 hangs: 3 s in step (watchdog.step_seconds = 2.6)"),
    "in C": ("ctypes.PyDLL(None).sleep(60)", EXIT_FAILED, "Timeout"),  # holds the interpreter's lock
}


@pytest.mark.parametrize("how", STUCK)
def test_a_rank_without_launcher_ends_itself(how):
    call, code, says = STUCK[how]
    program = f"""
import ctypes, time
from streamswav.config import WatchdogSection
from streamswav.training.watchdog import watch
def stuck():
    {call}
with watch(WatchdogSection(step_seconds=2.6), None) as watchdog:
    watchdog.enter("step")
    time.sleep(1)
    stuck()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert says in done.stderr
    assert "in stuck" in done.stderr
