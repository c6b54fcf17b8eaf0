"""Evaluations as processes: the same on several ranks, kept features, an interruption, a hang."""

import json
import os
import signal

import pytest
from runs import run, start_ranks
from tiny_run import save_tiny_run

from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY


@pytest.fixture
def asked(make_shards, tmp_path):
    """Arguments after the command."""
    save_tiny_run(str(tmp_path / "run"))
    make_shards(tmp_path / "train", counts=[30, 11, 7], kind="PNG", image=(24, 20), classes=5)
    make_shards(tmp_path / "test", counts=[13], kind="PNG", image=(24, 20), classes=5, seed=500)
    return [
        *("--checkpoint", str(tmp_path / "run")),
        *("--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")),
        *("--workers", "0", "--baselines", "pixels", "--device", "cpu"),
    ]


def read(path):
    return json.loads(path.read_text())


def test_three_ranks_write_what_one_does(asked, tmp_path):
    arguments = ["evaluate", *asked, "--protocols", "svm", "linear", "knn", "--k", "3", "48"]
    arguments += ["--temperature", "0.05", "0.2", "--epochs", "3", "--rate", "0.1", "1", "--costs", "1"]
    alone = run([*arguments, "--json", str(tmp_path / "one.json")], tmp_path / "one")
    assert alone.code == EXIT_DONE, alone.err
    with start_ranks(
        3, [*arguments, "--json", str(tmp_path / "three.json")], tmp_path / "three", launcher=[]
    ) as running:
        together = running.wait()
    assert together.code == EXIT_DONE, together.err
    assert read(tmp_path / "three.json") == read(tmp_path / "one.json")
    assert together.out == alone.out
    names = {value["protocol"] for value in read(tmp_path / "one.json")["values"]}
    assert {"kNN, k = 48, T = 0.2", "linear", "linear, rate 1, weight decay 1e-06", "svm"} < names


def test_what_cannot_work_is_refused_before_ranks_are_started(asked, tmp_path):
    for flags, reason in ((["--k", "0"], "0 is too few"), (["--storage.colour", "red"], "colour")):
        with start_ranks(2, ["knn", *asked, *flags], tmp_path / flags[0][2:], launcher=[]) as running:
            ended = running.wait()
        assert ended.code == EXIT_CONFIG
        assert reason in ended.err
        assert not running.ranks()


def test_an_error_that_all_ranks_have_is_told_once(asked, tmp_path):
    asked[asked.index("--checkpoint") + 1] = str(tmp_path / "nowhere")
    with start_ranks(2, ["knn", *asked], tmp_path / "out", launcher=[]) as running:
        ended = running.wait()
    assert ended.code == EXIT_CONFIG, ended.err
    assert ended.err.count("there is neither a checkpoint nor a file of weights") == 1


def test_features_that_are_kept_are_not_computed_again(asked, tmp_path):
    arguments = ["knn", *asked, "--features", str(tmp_path / "kept"), "--json"]
    first = run([*arguments, str(tmp_path / "first.json")], tmp_path / "first")
    assert first.code == EXIT_DONE, first.err
    for shard in [*(tmp_path / "train").glob("*.tar"), *(tmp_path / "test").glob("*.tar")]:
        as_it_was = shard.stat()
        shard.write_bytes(bytes(as_it_was.st_size))  # nothing can be read any more
        os.utime(shard, ns=(as_it_was.st_atime_ns, as_it_was.st_mtime_ns))
    again = run([*arguments, str(tmp_path / "again.json")], tmp_path / "again")
    assert again.code == EXIT_DONE, again.err
    assert read(tmp_path / "again.json") == read(tmp_path / "first.json")


def test_an_evaluation_that_was_killed_goes_on_with_what_it_kept(asked, make_shards, tmp_path):
    make_shards(tmp_path / "train", counts=[3] * 80, kind="PNG", image=(24, 20), classes=5)
    arguments = ["knn", *asked, "--k", "5", "--json"]
    whole = run([*arguments, str(tmp_path / "whole.json")], tmp_path / "whole")
    assert whole.code == EXIT_DONE, whole.err
    kept, again = (
        tmp_path / "kept",
        [*arguments, str(tmp_path / "again.json"), "--features", str(tmp_path / "kept")],
    )
    with start_ranks(2, again, tmp_path / "killed", launcher=[]) as running:
        running.wait_until(lambda _: list(kept.glob("train/part-*.json")))
        running.kill()
    parts = len(list(kept.glob("train/part-*.json")))
    assert not (kept / "test").exists()
    resumed = run(again, tmp_path / "resumed")
    assert resumed.code == EXIT_DONE, resumed.err
    assert 0 < parts < len(list(kept.glob("train/part-*.json")))
    assert read(tmp_path / "again.json") == read(tmp_path / "whole.json")


def test_a_signal_ends_an_evaluation_with_the_code_that_says_start_again(asked, tmp_path):
    arguments = ["linear", *asked, "--epochs", "1000000"]
    with start_ranks(2, arguments, tmp_path / "out", launcher=[]) as running:
        running.wait_until(lambda so_far: so_far.of("training"))
        running.signal(signal.SIGTERM)
        ended = running.wait()
    assert ended.code == EXIT_RETRY, ended.err
    assert not running.left_behind()


def test_an_evaluation_that_hangs_is_ended_by_the_watchdog(asked, tmp_path):
    arguments = ["linear", *asked, "--epochs", "1000000", "--watchdog.evaluation_seconds", "2"]
    with start_ranks(1, arguments, tmp_path / "out", launcher=[]) as running:
        running.wait_until(lambda so_far: so_far.of("training"))
        os.kill(running.ranks()[0], signal.SIGSTOP)
        ended = running.wait()
    assert ended.code == EXIT_RETRY, ended.err
    assert "in evaluation (watchdog.evaluation_seconds = 2)" in ended.err
