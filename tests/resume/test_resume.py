"""A run that is killed, stopped or damaged ends as one that was left alone, to the bit."""

import random
import shutil
import signal
import time

import pytest
import yaml
from runs import arguments, differences, newest, run, start, state_of

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY
from streamswav.stream.position import Position

COUNTS = [25, 14, 31, 20, 9, 22]
SAMPLES = sum(COUNTS)
PASSES = 2
STEPS = PASSES * SAMPLES // 16


@pytest.fixture(scope="module")
def bucket(s3, make_shards):
    url, folder = s3.make_bucket()
    paths = make_shards(folder / "train", counts=COUNTS)
    stats = ", ".join(
        f'"{path.name}": {{"samples": {count}}}' for path, count in zip(paths, COUNTS, strict=True)
    )
    (folder / "train" / "_stats.json").write_text(f'{{"shards": {{{stats}}}}}')
    return url, folder


@pytest.fixture(scope="module")
def command(s3, bucket):
    """Arguments of the run that all tests here make: the queue works, the prototypes' freeze ends."""

    def build(directory, **loader):
        return arguments(
            run={"directory": directory},
            stream={"urls": f"{bucket[0]}/train/", "passes": PASSES},
            storage={"endpoint_url": s3.endpoint},
            swav={"queue_length": 32, "queue_start_images": 48, "freeze_prototypes_images": 80},
            loader={"workers": 2, **loader},
            checkpoint={"images": 48},
        )

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The outcome and the final state of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(command(folder / "run"), folder, script=True)
    assert outcome.code == EXIT_DONE, outcome.err
    return folder, outcome, state_of(folder / "run")


def reached(step):
    return lambda outcome: any(event["step"] >= step for event in outcome.of("progress"))


def saved(outcome):
    return outcome.of("checkpoint")


def test_the_run_goes_through_freeze_queue_and_two_passes(whole):
    _, outcome, state = whole
    assert state["position"]["turn"] == PASSES
    assert Position.from_json(state["position"]).trained == STEPS * 16
    assert state["position"]["finished"]
    queue = state["ranks.pt/.0.queue.features"]
    assert queue.shape[1] == 32
    assert bool(queue.any(dim=2).all())
    momenta = [value for name, value in state.items() if "momentum" in name and hasattr(value, "shape")]
    assert all(bool(momentum.any()) for momentum in momenta)
    assert any(momentum.shape == state["model.pt/.network.prototypes.weight"].shape for momentum in momenta)
    assert outcome.said == []


def test_a_run_that_is_killed_twice_and_damaged_ends_the_same(whole, command, bucket, tmp_path):
    """Its directory is on S3, too."""
    url, folder = bucket
    again = command(f"{url}/run")
    dice = random.Random()
    for attempt, (first, last) in enumerate([(4, 7), (9, STEPS - 2)], 1):
        step = dice.randint(first, last)
        with start(again, tmp_path / f"attempt-{attempt}") as running:
            seen = running.wait_until(lambda so_far, step=step: reached(step)(so_far) and saved(so_far))
            running.signal(signal.SIGKILL)
            running.wait()
            assert running.left_behind() == []
    assert seen.of("resumed")
    # The newest that is whole: a kill may come between a checkpoint's list of files and the pointer to it.
    file = max((folder / "run" / "checkpoints").glob("*/checkpoint.json")).with_name("model.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    outcome = run(again, tmp_path / "last")
    assert outcome.code == EXIT_DONE, outcome.err
    (warning,) = outcome.of("warning")
    assert f"{file.parent.name}: model.pt is damaged" in warning["message"]
    assert outcome.of("resumed")[0]["step"] < int(file.parent.name.removeprefix("step-").partition(".")[0])
    assert differences(state_of(folder / "run"), whole[2]) == []


def test_a_run_that_is_stopped_by_signals_loses_no_step_and_ends_the_same(whole, command, tmp_path):
    steps = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with start(command(tmp_path / "run"), tmp_path / number.name) as running:
            running.wait_until(reached(5 if not steps else steps[-1] + 4))
            running.signal_group(number)
            stopped = running.wait(20)
            assert running.left_behind() == []
        assert stopped.code == EXIT_RETRY, stopped.err
        (line,) = stopped.said
        assert line.startswith("streamswav: ")
        assert "the same command continues" in line
        last = stopped.of("progress")[-1]["step"]
        assert stopped.of("checkpoint")[-1]["step"] == last
        assert [event["step"] for event in stopped.of("resumed")] == steps[-1:]
        steps.append(last)
    (newest(tmp_path / "run") / "checkpoint.json").unlink()
    outcome = run(command(tmp_path / "run"), tmp_path / "last")
    assert outcome.code == EXIT_DONE, outcome.err
    assert "cut off" in outcome.of("warning")[0]["message"]
    assert differences(state_of(tmp_path / "run"), whole[2]) == []


def test_a_finished_run_says_so_and_leaves_everything_as_it_is(whole, command, tmp_path):
    folder, first, _ = whole
    shutil.copytree(folder / "run", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    outcome = run(command(tmp_path / "run"), tmp_path / "again")
    assert outcome.code == EXIT_DONE, outcome.err
    assert "is done" in outcome.of("done")[0]["message"]
    assert outcome.out == first.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("workers", [0, 1])
def test_the_number_of_workers_changes_nothing(whole, command, tmp_path, workers):
    outcome = run(command(tmp_path / "run", workers=workers), tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    assert differences(state_of(tmp_path / "run"), whole[2]) == []


def test_a_finished_run_goes_on_when_more_passes_are_asked_for(whole, command, tmp_path):
    def build(*more):
        return [*command(tmp_path / "run", workers=0), *more]

    first = run(build("--stream.passes", "1"), tmp_path / "first")
    assert first.of("progress")[-1]["images"] == SAMPLES // 16 * 16
    assert run(["cooldown", *build("--stream.passes", "1")[1:]], tmp_path / "cooldown").code == EXIT_CONFIG
    second = run(build(), tmp_path / "second")
    assert second.code == EXIT_DONE, second.err
    assert state_of(tmp_path / "run")["position"] == whole[2]["position"]


def test_a_cool_down_ends_a_run_of_constant_rate(command, tmp_path):
    build = [*command(tmp_path / "run", workers=0), "--optimizer.schedule", "constant"]
    assert run([*build, "--training.images", "64"], tmp_path / "first").code == EXIT_DONE
    cooldown = ["cooldown", *build[1:], "--images", "96"]
    cooled = run(cooldown, tmp_path / "cooldown")
    assert cooled.code == EXIT_DONE, cooled.err
    rates = [event["rate"] for event in cooled.of("progress")]
    assert len(rates) == 6
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == first_rate(tmp_path / "run")
    again = run(cooldown, tmp_path / "again")
    assert "is done" in again.of("done")[0]["message"]


def first_rate(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["rate"]


def test_a_signal_before_the_first_step_ends_the_run_at_once(web, tmp_path):
    (web.folder / "list").write_text("s3://bucket/train/\n")
    web.faults.extend([("hang", 60)] * 10)
    waiting = arguments(run={"directory": tmp_path / "run"}, stream={"urls": f"@{web.url}/list"})
    with start(waiting, tmp_path) as running:
        running.wait_until(lambda _: web.requests)
        running.signal(signal.SIGTERM)
        stopped = running.wait(10)
    assert stopped.code == EXIT_RETRY
    (line,) = stopped.said
    assert "the same command" in line


def test_a_signal_is_heard_while_storage_hangs(web, make_shards, tmp_path):
    """And the workers that wait for it, for up to five minutes, do not keep the rank from leaving."""
    make_shards(web.folder, counts=[40, 40])
    long = arguments(
        run={"directory": tmp_path / "run"},
        stream={"urls": f"{web.url}/shard-00000{{0,1}}.tar", "rows": 1, "window": 4, "passes": 1000},
        storage={"block_bytes": 4096, "timeout_seconds": 300},
        loader={"workers": 1, "prefetch": 1, "read_ahead": 1},
    )
    with start(long, tmp_path) as running:
        running.wait_until(reached(3))
        web.faults.extend([("hang", 300)] * 1000)
        running.wait_until(lambda _: len(web.faults) < 1000)
        time.sleep(2)  # what was read before is trained by then
        running.signal(signal.SIGTERM)
        stopped = running.wait(20)
        assert running.left_behind() == []
    assert stopped.code == EXIT_RETRY
    assert stopped.of("checkpoint")[-1]["step"] == stopped.of("progress")[-1]["step"]
