"""A run goes on with another number of ranks and workers: the same batches, or the rest dealt again."""

import json
import signal

import pytest
import torch
from runs import arguments, differences, newest, run, start_ranks, state_of

from streamswav.errors import EXIT_CONFIG, EXIT_DONE
from streamswav.stream.outcomes import Tally
from streamswav.stream.position import Position

COUNTS = [37, 14, 51, 20, 9, 66]
SAMPLES = sum(COUNTS)
BATCH = 16


@pytest.fixture(scope="module")
def command(make_shards, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    make_shards(shards, counts=COUNTS)

    def build(directory, *, workers, columns=4):
        return arguments(
            run={"directory": directory},
            stream={"urls": shards, "columns": columns, "rows": 2, "samples": SAMPLES},
            swav={"queue_length": 32, "queue_start_images": 48},
            loader={"workers": workers},
            checkpoint={"images": 2 * BATCH},
        )

    return build


def position_of(directory):
    return Position.from_json(json.loads((newest(directory) / "position.json").read_text()))


def reached(step):
    return lambda so_far: any(event["step"] >= step for event in so_far.of("checkpoint"))


def run_ranks(command, folder, ranks, *, workers, until=None):
    """Run on so many ranks to the end, or kill them all once a step is saved."""
    with start_ranks(ranks, command(folder / "run", workers=workers), folder / f"{ranks}-{until}") as running:
        if until is None:
            outcome = running.wait()
            assert outcome.code == EXIT_DONE, outcome.err
            return outcome
        outcome = running.wait_until(reached(until))
        running.signal_group(signal.SIGKILL)
        running.wait()
        return outcome


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run on one rank that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(command, folder, 1, workers=1)
    return folder / "run"


def test_ranks_and_workers_that_divide_the_grid_train_the_same_samples(whole, command, tmp_path):
    run_ranks(command, tmp_path, 2, workers=2, until=4)
    run_ranks(command, tmp_path, 1, workers=2, until=8)
    outcome = run_ranks(command, tmp_path, 4, workers=1)
    assert outcome.of("resumed")
    assert not outcome.of("replanned")
    assert position_of(tmp_path / "run") == position_of(whole)
    assert drift(tmp_path / "run", whole) < 1e-3


def drift(directory, other):
    """The largest relative difference between the weights of two runs.

    Left out is the bias before the head's batch norm: its gradient is rounding noise.
    """
    one, two = (
        torch.load(newest(each) / "model.pt", weights_only=True)["network"] for each in (directory, other)
    )
    names = [name for name in one if name != "projection_head.0.bias"]
    return max(float((one[name] - two[name]).abs().max() / two[name].abs().max()) for name in names)


def test_ranks_that_do_not_divide_the_grid_deal_the_rest_again_and_train_it_once(command, tmp_path):
    run_ranks(command, tmp_path, 2, workers=1, until=4)
    outcome = run_ranks(command, tmp_path, 3, workers=1, until=8)
    (event,) = outcome.of("replanned")
    assert (event["batch"], event["columns"]) == (15, 3)
    assert "3 ranks x 1 workers do not divide the lane grid (4 columns, 2 rows" in event["message"]
    outcome = run_ranks(command, tmp_path, 4, workers=2)
    assert outcome.of("replanned")[0]["batch"] == BATCH
    position = position_of(tmp_path / "run")
    left = sum(len(piece.named()) for piece in position.carried)
    assert position.trained + left == SAMPLES
    assert left < BATCH
    assert position.total("trained") != Tally()
    audited = run(["audit", str(tmp_path / "run"), "--recount"], tmp_path / "audit")
    assert audited.code == EXIT_DONE, audited.out


def test_more_ranks_than_the_batch_has_samples_are_refused_with_the_reason(whole, command, tmp_path):
    def small(directory, **others):
        return [*command(directory, columns=2, **others), "--training.batch", "2", "--swav.queue_length", "0"]

    run_ranks(small, tmp_path, 2, workers=0, until=3)
    with start_ranks(3, small(tmp_path / "run", workers=0), tmp_path / "three") as running:
        refused = running.wait()
    assert refused.code == EXIT_CONFIG
    assert "3 ranks cannot share the run's global batch of 2 samples" in refused.err


@pytest.mark.parametrize(("ranks", "workers"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.all)])
def test_a_run_that_is_killed_ends_the_same_to_the_bit_on(ranks, workers, command, tmp_path):
    run_ranks(command, tmp_path / "whole", ranks, workers=workers)
    run_ranks(command, tmp_path / "killed", ranks, workers=workers, until=6)
    run_ranks(command, tmp_path / "killed", ranks, workers=workers)
    state = state_of(tmp_path / "whole" / "run")
    assert differences(state_of(tmp_path / "killed" / "run"), state) == []
