"""`streamswav finetune`: it learns, and a run that is killed, stopped or spread over ranks ends the same."""

import json
import shutil
import signal

import pytest
import torch
import yaml
from finetune_runs import CLASSES, finetune, make_sets, top1
from runs import arguments, differences, newest, run, start, start_ranks, state_of
from tiny_run import save_tiny_run, tiny_config

from streamswav import cli
from streamswav.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRY
from streamswav.transfer.weights.trunks import load_trunk

PASSES = 6


@pytest.fixture(scope="module")
def bucket(s3, make_shards):
    url, folder = s3.make_bucket()
    make_sets(make_shards, folder)
    save_tiny_run(str(folder / "pretrained"), config=tiny_config(stem="small"))
    return url, folder


@pytest.fixture(scope="module")
def command(s3, bucket):
    """A run that begins with a trunk in the bucket, and mixes and augments."""

    def build(directory, **keys):
        url, _ = bucket
        given = {
            "run.directory": directory,
            "model.init": f"{url}/pretrained",
            "storage.endpoint_url": s3.endpoint,
            "stream.passes": PASSES,
            "checkpoint.images": 48,
            "finetune.mixup": 0.2,
            "finetune.cutmix": 0.5,
            "finetune.rand_augment": 1,
            "finetune.evaluate_every": 3,
        }
        return finetune(url, keys=given | keys)

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(command(folder / "run"), folder)
    assert outcome.code == EXIT_DONE, outcome.err
    return folder / "run", outcome


def saved(step):
    return lambda outcome: any(event["step"] >= step for event in outcome.of("checkpoint"))


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    del found["model"]["checkpoint"]
    return found


def test_it_learns_and_says_what_it_came_to(whole):
    folder, outcome = whole
    summary = json.loads(outcome.out)
    found = results(folder)
    last, best = found["values"]
    assert summary["test"] == last["scores"]
    assert last["scores"]["top1"] > 2 / CLASSES
    assert (last["column"], last["settings"]["reported"]) == ("checkpoint", "last epoch")
    assert "best epoch, chosen on these test images" in best["column"]
    assert best["scores"]["top1"] >= last["scores"]["top1"]
    assert last["intervals"]["top1"]["low"] < last["scores"]["top1"] <= last["intervals"]["top1"]["high"]
    assert found["data"]["test"]["images"] == 24
    assert int(found["data"]["test"]["digest"], 16) > 0  # by which `compare` knows the same images
    assert f"{100 * last['scores']['top1']:.2f}" in outcome.err
    probes = outcome.of("probe")
    assert len(probes) == 2
    assert probes[-1]["test_top1"] == last["scores"]["top1"]


def test_a_run_that_is_killed_twice_ends_the_same_to_the_bit(whole, command, tmp_path):
    build = command(tmp_path / "run")
    for step in (3, 12):
        with start(build, tmp_path / f"killed-{step}") as running:
            running.wait_until(saved(step))
            running.kill()
    outcome = run(build, tmp_path)
    assert outcome.code == EXIT_DONE, outcome.err
    assert outcome.of("resumed")
    assert differences(state_of(whole[0]), state_of(tmp_path / "run")) == []
    assert results(tmp_path / "run") == results(whole[0])


def test_a_run_that_is_drained_goes_on(whole, command, tmp_path):
    build = command(tmp_path / "run")
    with start(build, tmp_path / "drained") as running:
        running.wait_until(saved(3))
        running.signal(signal.SIGTERM)
        assert running.wait().code == EXIT_RETRY
    assert run(build, tmp_path).code == EXIT_DONE
    assert differences(state_of(whole[0]), state_of(tmp_path / "run")) == []
    assert results(tmp_path / "run") == results(whole[0])


def test_a_run_that_is_done_says_the_same_again(whole, command, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    outcome = run(command(tmp_path / "run"), tmp_path)
    assert outcome.code == EXIT_DONE
    assert json.loads(outcome.out)["test"] == json.loads(whole[1].out)["test"]
    assert outcome.of("done")


def test_two_ranks_train_the_same_as_one(command, tmp_path):
    """Without mixing, whose partners are a rank's own; the sums are rounded in another order."""
    plain = {"finetune.mixup": 0, "finetune.cutmix": 0, "finetune.evaluate_every": "null", "stream.passes": 1}
    alone = run(command(tmp_path / "alone", **plain | {"loader.workers": 1}), tmp_path / "1")
    assert alone.code == EXIT_DONE, alone.err
    with start_ranks(2, command(tmp_path / "both", **plain), tmp_path / "2", launcher=[]) as running:
        both = running.wait()
    assert both.code == EXIT_DONE, both.err
    one, other = (
        torch.load(newest(tmp_path / name) / "model.pt", weights_only=True)["network"]
        for name in ("alone", "both")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4, msg=name)
    assert json.loads(alone.out)["stream"] == json.loads(both.out)["stream"]
    assert top1(tmp_path / "alone") == pytest.approx(top1(tmp_path / "both"), abs=0.05)


def test_a_finetuned_trunk_is_read_as_any_other(whole, bucket, s3, tmp_path, capfd):
    folder, _ = whole
    state = torch.load(newest(folder) / "model.pt", weights_only=True)["network"]
    trunk = load_trunk(folder)
    assert all(torch.equal(tensor, state[f"trunk.{name}"]) for name, tensor in trunk.state_dict().items())
    assert {name for name in state if not name.startswith("trunk.")} == {
        "head.heads.0.weight",
        "head.heads.0.bias",
    }
    url, _ = bucket
    words = ["--checkpoint", str(folder), "--train", f"{url}/train/", "--test", f"{url}/test/"]
    assert cli.main(["knn", *words, "--k", "5", "--storage.endpoint_url", s3.endpoint]) == EXIT_DONE
    assert "top-1" in capfd.readouterr().out


def test_the_folder_of_another_kind_of_run_is_refused_in_one_line(whole, command, bucket, tmp_path):
    folder, _ = whole
    data = bucket[1]
    shutil.copytree(folder, tmp_path / "finetuned")
    pretraining = arguments(run={"directory": tmp_path / "finetuned"}, stream={"urls": data / "train"})
    outcome = run(pretraining, tmp_path / "1")
    assert (outcome.code, len(outcome.said)) == (EXIT_CONFIG, 1)
    assert "holds a finetuning run" in outcome.said[0]
    pretraining = arguments(run={"directory": tmp_path / "pretrained"}, stream={"urls": data / "train"})
    assert run(pretraining, tmp_path / "2").code == EXIT_DONE
    outcome = run(command(tmp_path / "pretrained"), tmp_path / "3")
    assert (outcome.code, len(outcome.said)) == (EXIT_CONFIG, 1)
    assert "holds a pretraining run" in outcome.said[0]


def test_a_run_keeps_what_it_began_with(whole, command, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    begun = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert begun["run"]["task"] == "finetune"
    assert begun["finetune"]["rates"] == [1.0]
    outcome = run(command(tmp_path / "run", **{"finetune.rates": "[0.5]"}), tmp_path)
    assert outcome.code == EXIT_CONFIG
    assert "finetune.rates" in outcome.said[0]
