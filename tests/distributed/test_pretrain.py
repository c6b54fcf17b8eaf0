"""`streamswav pretrain` on two ranks."""

import json
import shutil
import signal

import pytest
from runs import arguments, differences, newest, run, start_ranks, state_of

from streamswav.errors import EXIT_RETRY

COUNTS = [25, 14, 31, 20, 9]


@pytest.fixture(scope="module")
def command(make_shards, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    paths = make_shards(shards, counts=COUNTS)
    counted = {path.name: {"samples": count} for path, count in zip(paths, COUNTS, strict=True)}
    (shards / "_stats.json").write_text(json.dumps({"shards": counted}))

    def build(directory):
        return arguments(
            run={"directory": directory},
            stream={"urls": shards, "passes": 2},
            swav={"queue_length": 32, "queue_start_images": 48, "freeze_prototypes_images": 64},
            loader={"workers": 1},
            checkpoint={"images": 32},
        )

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with start_ranks(2, command(folder / "run"), folder) as running:
        outcome = running.wait()
    assert outcome.code == 0, outcome.err
    return folder / "run", outcome


def test_every_sample_is_accounted_for(whole):
    folder, outcome = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(outcome.out) == summary
    stream = summary["stream"]
    assert stream["manifest"] == 2 * sum(COUNTS)
    assert stream["trained"] + stream["quarantined"] + stream["left"] == stream["manifest"]
    assert stream["left"] < 16
    assert summary["images"] == stream["trained"] == 16 * summary["steps"]


def test_each_rank_has_its_own_queue_and_one_speaks(whole):
    folder, outcome = whole
    state = state_of(folder)
    one, other = (state[f"ranks.pt/.{rank}.queue.features"] for rank in (0, 1))
    assert one.shape == other.shape == (2, 16, 8)
    assert not (one == other).any()
    steps = [event["step"] for event in outcome.of("progress")]
    assert steps == sorted(set(steps))


def saved_after(step):
    return lambda so_far: any(event["step"] >= step for event in so_far.of("checkpoint"))


@pytest.fixture(scope="module")
def interrupted(command, tmp_path_factory):
    """A run that was drained, then killed; and what it said when it was drained."""
    folder = tmp_path_factory.mktemp("interrupted")
    with start_ranks(2, command(folder / "run"), folder / "first", launcher=[]) as running:
        running.wait_until(saved_after(2))
        running.signal(signal.SIGTERM)
        drained = running.wait(30)
        assert running.left_behind() == []
    with start_ranks(2, command(folder / "run"), folder / "second") as running:
        running.wait_until(saved_after(drained.of("checkpoint")[-1]["step"] + 2))
        assert len(running.members()) >= 1 + 2 + 2  # launcher, ranks, their fork servers; workers come and go
        running.signal_group(signal.SIGKILL)
        assert running.left_behind() == []
    return folder, drained


def test_a_signal_to_the_launcher_drains_all_ranks(interrupted):
    _, drained = interrupted
    assert drained.code == EXIT_RETRY
    steps = [drained.of(name)[-1]["step"] for name in ("checkpoint", "progress")]
    assert steps[0] == steps[1], drained.err[-4000:]
    (line,) = (line for line in drained.said if line.startswith("streamswav: "))
    assert "the same command continues" in line


def test_ranks_that_were_drained_and_killed_end_the_same(interrupted, whole, command, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted[0] / "run", folder)
    before = newest(folder).name
    with start_ranks(2, command(folder), tmp_path) as running:
        outcome = running.wait()
    assert outcome.code == 0, outcome.err
    assert before in outcome.of("resumed")[0]["message"]
    assert differences(state_of(folder), state_of(whole[0])) == []


def test_another_number_of_ranks_trains_the_same_samples(interrupted, whole, command, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted[0] / "run", folder)
    outcome = run(command(folder), tmp_path)
    assert outcome.code == 0, outcome.err
    assert state_of(folder)["position"] == state_of(whole[0])["position"]
