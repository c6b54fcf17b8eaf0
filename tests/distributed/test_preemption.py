"""Nodes are drained, killed and stopped at every moment of a run; it goes on, on as many ranks or others.

Two launchers on one machine are the nodes. ops/preemption.md tells what came of it, and is held to it here.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import arguments, differences, free_port, newest, run, start_ranks, state_of

from streamswav.errors import EXIT_DONE, EXIT_FAILED, EXIT_RETRY

sys.path.append(str(Path(__file__).parents[2] / "ops" / "benchmarks"))
from fault_proxy import FaultProxy

COUNTS = [25, 14, 31]
SAMPLES = sum(COUNTS)
BATCH = 16
INTERVAL = 4  # steps from checkpoint to checkpoint
MANY = 1000
PASSES = 3
HANG_SECONDS = 3

NODES = (1, 1)
BACK = {"the same": (1, 1), "4": (2, 2), "1": (1,), "3": (2, 1)}
DIVIDING = ("the same", "4", "1")

AGAIN, CRASHED, KILLED = EXIT_RETRY, EXIT_FAILED, -signal.SIGKILL
PAGE = Path(__file__).parents[2] / "ops" / "preemption.md"
NOTHING = "nothing"
LATEST = "steps since the last checkpoint"
HELD = "steps since that checkpoint, which is finished"
BEFORE = "steps since the checkpoint before it"


# What is struck. Each is given the launchers of both nodes.


def to_launcher(node, number):
    return lambda nodes: nodes[node].signal(number)


def to_node(node, number):
    """As a terminal, or the end of a machine, does to all its processes."""
    return lambda nodes: nodes[node].signal_group(number)


def to_rank(node, number):
    return lambda nodes: os.kill(nodes[node].ranks()[0], number)


def to_loader(node, number):
    """To a loader process: a child of the fork server of a rank. They come and go with the passes."""

    def strike(nodes):
        while not nodes[node].ended:
            members, ranks = nodes[node].members(), nodes[node].ranks()
            servers = [each.pid for each in members if each.parent in ranks and "forkserver" in each.command]
            with suppress(StopIteration, ProcessLookupError):
                os.kill(next(each.pid for each in members if each.parent in servers), number)
                return
            time.sleep(0.005)

    return strike


def to_all(number):
    """To everything; it is stopped first, so that nobody sees another's end."""

    def strike(nodes):
        for each in (signal.SIGSTOP, number):
            for node in nodes:
                node.signal_group(each)

    return strike


@dataclass(frozen=True)
class Blow:
    """What is done, what the two launchers end with, and whether rank 0 finishes what it is writing."""

    strike: Callable
    codes: tuple[int, int]
    drains: bool = False
    finishes: bool = True
    hangs: bool = False
    workers: int = 0


BLOWS = {
    "SIGTERM to launcher 1": Blow(to_launcher(1, signal.SIGTERM), (AGAIN, AGAIN), drains=True),
    "SIGTERM to all processes of node 0": Blow(to_node(0, signal.SIGTERM), (AGAIN, AGAIN), drains=True),
    "SIGKILL to rank 0": Blow(to_rank(0, signal.SIGKILL), (CRASHED, AGAIN), finishes=False),
    "SIGKILL to rank 1": Blow(to_rank(1, signal.SIGKILL), (AGAIN, CRASHED)),
    "SIGKILL to a loader process": Blow(to_loader(1, signal.SIGKILL), (AGAIN, CRASHED), workers=1),
    "SIGKILL to launcher 0": Blow(to_launcher(0, signal.SIGKILL), (KILLED, AGAIN), finishes=False),
    "SIGKILL to launcher 1": Blow(to_launcher(1, signal.SIGKILL), (AGAIN, KILLED)),
    "SIGKILL to all processes of node 1": Blow(to_node(1, signal.SIGKILL), (AGAIN, KILLED)),
    "SIGKILL to everything": Blow(to_all(signal.SIGKILL), (KILLED, KILLED), finishes=False),
    "SIGSTOP to rank 1": Blow(to_rank(1, signal.SIGSTOP), (AGAIN, AGAIN), finishes=False, hangs=True),
}
MOMENTS = ("start-up", "step", "checkpoint")
CASES = [
    (blow, moment)
    for blow in BLOWS
    for moment in MOMENTS
    if not (moment == "start-up" and BLOWS[blow].workers)  # there are none yet
]
# One of each mechanism, each moment and each number of ranks in every test run.
ALWAYS = {
    ("SIGTERM to launcher 1", "step", "the same"),
    ("SIGTERM to all processes of node 0", "checkpoint", "3"),
    ("SIGKILL to rank 0", "checkpoint", "the same"),
    ("SIGKILL to rank 1", "start-up", "the same"),
    ("SIGKILL to a loader process", "step", "4"),
    ("SIGKILL to launcher 0", "step", "1"),
    ("SIGKILL to all processes of node 1", "checkpoint", "the same"),
    ("SIGKILL to everything", "step", "3"),
    ("SIGSTOP to rank 1", "step", "the same"),
}


def lost(blow, moment):
    """What has to be trained once more."""
    if moment == "start-up" or blow.drains:
        return NOTHING
    if moment == "step":
        return LATEST
    return HELD if blow.finishes else BEFORE


@pytest.fixture(scope="module")
def build(make_shards, tmp_path_factory):
    """Arguments of a run whose steps do not depend on how many passes it has."""
    shards = tmp_path_factory.mktemp("shards")
    make_shards(shards, counts=COUNTS)

    def made(directory, *, passes, workers=0, **sections):
        return arguments(
            run={"directory": directory},
            stream={"urls": shards, "passes": passes, "samples": SAMPLES, "columns": 4},
            swav={"queue_length": 32, "queue_start_images": 48, "freeze_prototypes_images": 16},
            optimizer={"schedule": "constant"},
            loader={"workers": workers},
            checkpoint={"images": INTERVAL * BATCH, "keep_every_images": SAMPLES * MANY},
            **sections,
        )

    return made


@pytest.fixture(scope="module")
def undisturbed(build, tmp_path_factory):
    """What a run has come to on so many ranks and after so many passes, if nobody disturbs it."""
    known = {}

    def state(ranks, passes):
        if (ranks, passes) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with start_ranks(ranks, build(folder / "run", passes=passes), folder) as running:
                assert running.wait().code == EXIT_DONE, running.so_far().err
            known[ranks, passes] = state_of(folder / "run")
        return known[ranks, passes]

    return state


class Place:
    """Where a run is kept: a folder or, where requests must be held for a while, a bucket behind a gate.

    Attributes:
        url: of the run.
        folder: of the run, on this machine.
    """

    def __init__(self, url, folder, *, server=None, gate=None):
        self.url, self.folder, self.server, self.gate = url, folder, server, gate

    def storage(self, *, gated=False):
        if self.gate is None:
            return {}
        return {"endpoint_url": self.gate.url if gated else self.server.endpoint}

    def release(self):
        """Let all go that is held; it is asked for anew."""
        self.gate.holds = lambda method, path: False
        self.gate.pause()
        self.gate.resume()


@contextmanager
def a_place(moment, s3, tmp_path):
    if moment == "step":
        yield Place(tmp_path / "run", tmp_path / "run")
        return
    url, folder = s3.make_bucket()
    with FaultProxy(s3.endpoint, writes=True, stall_seconds=600) as gate:
        if moment == "start-up":
            gate.holds = lambda method, path: True
        yield Place(f"{url}/run", folder / "run", server=s3, gate=gate)


@contextmanager
def launched(topology, given, folder):
    """A launcher for each node, with so many ranks each."""
    port = free_port()
    with ExitStack() as stack:
        nodes = []
        for node, ranks in enumerate(topology):
            flags = ["--nnodes", len(topology), "--node-rank", node, "--master-port", port]
            launcher = [*map(str, flags), "--master-addr", "localhost"]
            running = start_ranks(ranks, given, folder / str(node), launcher=launcher)
            nodes.append(stack.enter_context(running))
        yield nodes


def saved(so_far):
    return any(event["step"] >= INTERVAL for event in so_far.of("checkpoint"))


def await_start_up(nodes, place):
    """Until rank 0's first request is held; all ranks have joined by then."""
    nodes[0].wait_until(lambda _: place.gate.injected["stall"])
    assert [len(node.ranks()) for node in nodes] == list(NODES)


def await_step(nodes, _):
    """Until a step after a checkpoint is done, and the next goes on."""
    nodes[0].wait_until(lambda so_far: saved(so_far) and so_far.of("progress")[-1]["step"] > INTERVAL)


def await_checkpoint(nodes, place):
    """Until the second checkpoint has begun: its tensors lie there, its list does not."""
    nodes[0].wait_until(saved)
    place.gate.holds = lambda method, path: method != "GET" and "/model.pt" in path
    nodes[0].wait_until(lambda _: place.gate.injected["stall"])


REACH = dict(zip(MOMENTS, (await_start_up, await_step, await_checkpoint), strict=True))


def disturb(blow, moment, place, build, folder):
    """Run on both nodes, strike, and return what they said; nothing of them is left."""
    seconds = HANG_SECONDS if blow.hangs else 600
    given = build(
        place.url,
        passes=MANY,
        workers=blow.workers,
        storage=place.storage(gated=True),
        watchdog={"startup_seconds": seconds if moment == "start-up" else 600, "step_seconds": seconds},
    )
    with launched(NODES, given, folder) as nodes:
        REACH[moment](nodes, place)
        blow.strike(nodes)
        if place.gate and not blow.hangs:
            place.release()
        while blow.workers and not nodes[1].ended:
            blow.strike(nodes)  # one that had nothing to do any more is not missed
            time.sleep(0.01)
        outcomes = [node.wait(60) for node in nodes]
        assert [node.left_behind() for node in nodes] == [[], []]
    assert tuple(outcome.code for outcome in outcomes) == blow.codes, [each.err[-3000:] for each in outcomes]
    assert not any("Traceback" in outcome.err for outcome in outcomes), outcomes[0].err + outcomes[1].err
    return outcomes


def step_of(folder):
    """The step of the newest checkpoint."""
    return int(re.match(r"step-(\d+)", newest(folder).name)[1])


def check_saved(blow, moment, outcome, folder):
    """See that nothing is lost beyond what the table says; return the step from which the run goes on."""
    if moment == "start-up":
        assert not (folder / "checkpoints" / "latest").exists()
        assert outcome.of("progress") == []
        return 0
    step, told = step_of(folder), outcome.of("checkpoint")[-1]["step"]
    assert (newest(folder) / "checkpoint.json").is_file()
    assert step >= told
    if blow.drains:
        assert step == outcome.of("progress")[-1]["step"]
    elif moment == "checkpoint":
        held = sorted(each.name for each in (folder / "checkpoints").glob("step-*"))[-1]
        assert (held != newest(folder).name) == (lost(blow, moment) == BEFORE)
        assert step >= 2 * INTERVAL if blow.finishes else step == INTERVAL
    return step


def finish(back, place, build, folder, *, passes):
    """Let the run go on to its end on other nodes; return what the first one said."""
    given = build(place.url, passes=passes, storage=place.storage())
    with launched(BACK[back], given, folder) as nodes:
        outcomes = [node.wait(90) for node in nodes]
        assert all(node.left_behind() == [] for node in nodes)
    assert {outcome.code for outcome in outcomes} == {EXIT_DONE}, [each.err[-3000:] for each in outcomes]
    return outcomes[0]


def check_samples(back, place, undisturbed, *, passes, folder):
    """See that each sample was trained as often as it should: in the same batches, where the ranks allow."""
    state, ranks = state_of(place.folder), sum(BACK[back])
    if ranks == sum(NODES):
        assert differences(state, undisturbed(ranks, passes)) == []
    elif back in DIVIDING:
        assert state["position"] == undisturbed(sum(NODES), passes)["position"]
    stream = json.loads((place.folder / "summary.json").read_text())["stream"]
    assert stream["trained"] + stream["left"] == passes * SAMPLES
    storage = [part for key, text in place.storage().items() for part in (f"--storage.{key}", text)]
    audited = run(["audit", str(place.url), "--recount", "--workers", "1", *storage], folder)
    assert audited.code == EXIT_DONE, audited.out


def parameters():
    for blow, moment in CASES:
        # Before the first checkpoint there is no run yet: its grid is chosen anew, and 3 must divide it.
        for back in DIVIDING if moment == "start-up" else BACK:
            always = (blow, moment, back) in ALWAYS
            marks = [] if always else [pytest.mark.all]
            yield pytest.param(blow, moment, back, marks=marks, id=f"{blow}-{moment}-{back}")


@pytest.mark.parametrize(("struck", "moment", "back"), [*parameters()])
def test_a_run_that_was_struck_goes_on(struck, moment, back, s3, build, undisturbed, tmp_path):
    blow = BLOWS[struck]
    with a_place(moment, s3, tmp_path) as place:
        outcomes = disturb(blow, moment, place, build, tmp_path / "first")
        step = check_saved(blow, moment, outcomes[0], place.folder)
        passes = max(PASSES, step * BATCH // SAMPLES + 2)
        again = finish(back, place, build, tmp_path / "second", passes=passes)
        assert [event["step"] for event in again.of("resumed")] == ([step] if step else [])
        assert bool(again.of("replanned")) == (back not in DIVIDING and step > 0)
        assert again.of("lease") == []
        check_samples(back, place, undisturbed, passes=passes, folder=tmp_path / "audit")


def named(code):
    return str(code) if code >= 0 else f"by {signal.Signals(-code).name}"


def test_the_page_tells_every_case():
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| SIG")
    ]
    test = f"`{test_a_run_that_was_struck_goes_on.__name__}[{{}}-{{}}-...]`"
    assert rows == [
        [
            struck,
            moment,
            *map(named, BLOWS[struck].codes),
            lost(BLOWS[struck], moment),
            ", ".join(DIVIDING if moment == "start-up" else BACK),
            ", ".join(back for back in BACK if (struck, moment, back) in ALWAYS) or "-",
            test.format(struck, moment),
        ]
        for struck, moment in CASES
    ]


def test_every_test_that_the_page_names_exists():
    sources = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)", PAGE.read_text())
    assert len(set(names)) > 5
    assert [name for name in names if f"def {name}(" not in sources] == []
