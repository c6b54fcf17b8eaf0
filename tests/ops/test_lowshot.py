"""`streamswav lowshot`: each cell of the grid is a run, a finished one is not run again, and all are told."""

import json
import shlex
import shutil
import statistics

import pytest
from finetune_runs import finetune, make_sets, top1
from tiny_run import save_tiny_run, tiny_config

from streamswav import cli
from streamswav.errors import EXIT_CONFIG, EXIT_DONE
from streamswav.stream.store import Store
from streamswav.transfer.measuring.results_file import read_results

SEEDS = ("0", "1", "2")


@pytest.fixture(scope="module")
def data(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_sets(make_shards, folder)
    save_tiny_run(str(folder / "pretrained"), config=tiny_config())
    return folder


def grid(data, directory, **keys):
    given = {
        "run.directory": directory,
        "training.batch": 8,
        "stream.columns": 1,
        "stream.rows": 1,
        "stream.passes": 2,
        "lowshot.scratch": "{optimizer.rate: 0.1}",
    }
    words = finetune(str(data), keys=given | keys)[1:]
    command = ["lowshot", "--init", str(data / "pretrained"), "--per-class", "4", "--seeds", *SEEDS]
    return [*command, "--baselines", "scratch", *words]


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    assert cli.main(grid(data, folder)) == EXIT_DONE
    return folder


def test_mean_and_spread_are_those_of_the_runs(done):
    results = read_results(str(done / "results.json"), Store())
    for column, name in (("checkpoint", "finetuned"), ("scratch", "scratch")):
        shares = {seed: top1(done / f"{name}-4-seed-{seed}") for seed in SEEDS}
        value = results.value("4 images a class", column)
        assert value.by_seed["top1"] == shares
        assert value.scores["top1"] == pytest.approx(statistics.fmean(shares.values()))
        assert value.spread["top1"] == pytest.approx(statistics.stdev(shares.values()))
    pairs = [
        results.value("4 images a class", column).by_seed["top1"] for column in ("checkpoint", "scratch")
    ]
    gained = results.value("4 images a class", "difference")
    assert gained.by_seed["top1"] == {seed: pairs[0][seed] - pairs[1][seed] for seed in SEEDS}


def test_both_columns_of_a_seed_have_the_same_images_and_budget(done):
    drawn = []
    for seed in SEEDS:
        runs = [json.loads((done / f"{name}-4-seed-{seed}" / "summary.json").read_text())
                for name in ("finetuned", "scratch")]  # fmt: skip
        assert runs[0]["shards_url"] == runs[1]["shards_url"]
        assert runs[0]["images"] == runs[1]["images"] == 32
        assert {run["seed"] for run in runs} == {int(seed)}
        drawn.append(json.loads((done / f"images-4-seed-{seed}" / "subset.json").read_text())["keys"])
    assert len({tuple(keys) for keys in drawn}) == len(SEEDS)
    config = (done / "scratch-4-seed-0" / "config.yaml").read_text()
    assert "rate: 0.1\n" in config
    assert "trunk: resnet10" in config


def test_runs_that_are_done_are_not_run_again(data, done, tmp_path, capfd):
    folder = tmp_path / "grid"
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "scratch-4-seed-1")
    assert cli.main([*grid(data, folder), "--list"]) == EXIT_DONE
    (command,) = capfd.readouterr().out.splitlines()
    assert command.startswith("streamswav launch finetune ")
    assert str(folder / "scratch-4-seed-1") in command
    assert cli.main(grid(data, folder)) == EXIT_DONE
    said = capfd.readouterr()
    events = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    assert sum(event["event"] == "cell" for event in events) == 1
    before, after = (json.loads((each / "results.json").read_text()) for each in (done, folder))
    assert before["values"] == after["values"]
    assert "difference" in said.out


def test_the_listed_command_runs_the_same_cell(data, done, tmp_path, capfd):
    folder = tmp_path / "grid"
    assert cli.main([*grid(data, folder), "--list"]) == EXIT_DONE
    command = next(line for line in capfd.readouterr().out.splitlines() if "scratch-4-seed-2" in line)
    assert cli.main(shlex.split(command)[2:]) == EXIT_DONE
    assert top1(folder / "scratch-4-seed-2") == top1(done / "scratch-4-seed-2")


def test_what_the_stream_leaves_out_is_not_drawn(data, done, tmp_path):
    drawn = json.loads((done / "images-4-seed-0" / "subset.json").read_text())["keys"]
    (tmp_path / "excluded.txt").write_text(drawn[0] + "\n")
    given = grid(data, tmp_path / "grid", **{"stream.exclude": tmp_path / "excluded.txt"})
    given[given.index("1") : given.index("2") + 1] = []  # of the seeds
    assert cli.main(given) == EXIT_DONE
    left = json.loads((tmp_path / "grid" / "images-4-seed-0" / "subset.json").read_text())["keys"]
    assert drawn[0] not in left
    assert len(left) == len(drawn)


def test_another_grid_in_the_same_folder_is_refused(data, done, capfd):
    assert cli.main(grid(data, done, **{"stream.passes": 3})) == EXIT_CONFIG
    assert "stream.passes = 3" in capfd.readouterr().err
    assert cli.main(grid(data, done / "finetuned-4-seed-0")) == EXIT_CONFIG
    assert "holds a run" in capfd.readouterr().err
    assert cli.main(grid(data, done, **{"lowshot.scratch": "{optimizer.rat: 1}"})) == EXIT_CONFIG
    assert "optimizer.rat" in capfd.readouterr().err
