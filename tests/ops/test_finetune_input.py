"""What users get wrong about `streamswav finetune` is said in one line, before anything is trained."""

import json
from pathlib import Path

import pytest
from finetune_runs import BATCH, finetune, make_sets, top1
from tiny_run import save_tiny_run, tiny_config

from streamswav import cli
from streamswav.config import load_config
from streamswav.defaults import FINETUNE_BASE
from streamswav.errors import EXIT_CONFIG, EXIT_DONE

RECIPES = sorted((Path(__file__).parents[2] / "ops" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(make_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_sets(make_shards, folder)
    make_shards(folder / "plain", counts=[20, 20], labels=False)
    save_tiny_run(str(folder / "pretrained"), config=tiny_config())
    return folder


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"finetune.test": "[]"}, "finetune.test: name labelled shards"),
        ({"finetune.test": "{data}/plain"}, "(8 no_label); a labelled sample has a .cls member"),
        ({"finetune.test": "{data}/none"}, "{data}/none"),
        ({"stream.urls": "{data}/plain"}, "0 usable samples, 120 more were excluded or filtered"),
        ({"labels.classes": 2}, "label_not_a_class_number"),
        ({"labels.classes": "null"}, "labels.classes: say how many classes there are"),
        ({"model.init": "{data}/nothing"}, "{data}/nothing: there is neither a checkpoint nor a file"),
        ({"model.init": "{data}/pretrained", "model.trunk": "resnet18"}, "model.init has 'resnet10'"),
        ({"run.task": "pretrain"}, "crops.counts = [1]: swapped prediction needs at least two crops"),
        ({"crops.counts": "[2]"}, "crops.counts = [2]: finetuning takes one crop an image"),
        ({"finetune.rates": "[0.1, 0.2]"}, "finetune.mode frozen"),
        ({"finetune.mode": "frozen", "finetune.layer_decay": 0.5}, "the trunk is frozen"),
        ({"finetune.test_split": "val"}, "needs labels.file and labels.split"),
        ({"finetune.subset": "{data}/keys.txt"}, "{data}/keys.txt"),
        ({"finetune.mod": "full"}, "did you mean finetune.mode"),
        ({"finetune.evaluate_every": 1, "stream.urls": "{data}/test"}, "give stream.samples"),
        ({"stream.follow": "true", "stream.passes": 1}, "finetuning has an end"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_what_cannot_work_is_said_in_one_line(data, tmp_path, capfd, keys, said):
    given = {key: str(value).replace("{data}", str(data)) for key, value in keys.items()}
    words = finetune(str(data), keys={"run.directory": tmp_path / "run", "stream.skip_probation": 0} | given)
    assert cli.main(words) == EXIT_CONFIG
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert said.replace("{data}", str(data)) in lines[0]
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_pretraining_has_no_use_for_what_is_finetunings(capfd):
    assert cli.main(["pretrain", "--finetune.test", "x", "--print-config"]) == EXIT_CONFIG
    assert "finetune.test: is for streamswav finetune" in capfd.readouterr().err
    assert cli.main(["finetune", "--init", "x", "--print-config"]) == EXIT_DONE
    assert "task: finetune" in capfd.readouterr().out


def test_samples_without_a_label_are_accounted_for(make_shards, data, tmp_path, capfd):
    table = tmp_path / "labels.csv"
    rows = [f"{shard}_{index},{(20 * shard + index) % 2},{('train', 'val')[index % 2]}"
            for shard in range(2) for index in range(18)]  # fmt: skip
    table.write_text("\n".join(["key,label,split", *rows]))
    keys = {
        "run.directory": tmp_path / "run",
        "stream.urls": data / "plain",
        "finetune.test": "[]",
        "finetune.test_split": "val",
        "labels.classes": "null",
        "labels.file": table,
        "labels.split": "split",
        "stream.passes": 2,
        "training.batch": 8,
        "loader.workers": 0,
    }
    assert cli.main(finetune(str(data), keys=keys)) == EXIT_DONE
    summary = json.loads(capfd.readouterr().out)
    assert summary["stream"]["trained"] + summary["stream"]["left"] == 2 * 18
    assert summary["stream"]["filtered"] == 2 * (18 + 4)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["data"]["test"]["images"] == 18
    assert found["model"]["classes"] == 2
    reasons = [json.loads(line)["reason"] for path in (tmp_path / "run" / "filtered").iterdir()
               for line in path.read_text().splitlines()]  # fmt: skip
    assert sorted(set(reasons)) == ["no_label", "other_split"]


def test_several_labels_an_image_are_measured_by_average_precision(data, tmp_path, capfd):
    table = tmp_path / "labels.csv"
    rows = ["key,red,green,blue"]
    for shard, count in enumerate([20, 17, 13, 20]):
        for index in range(count):
            number = sum([20, 17, 13, 20][:shard]) + index
            colour = number % 4
            rows.append(f"{shard}_{index},{int(colour in (0, 3))},{int(colour in (1, 3))},{int(colour == 2)}")
    table.write_text("\n".join(rows))
    keys = {
        "run.directory": tmp_path / "run",
        "finetune.test": data / "train",
        "labels.file": table,
        "labels.label": "[red, green, blue]",
        "labels.classes": "null",
        "stream.passes": 6,
        "finetune.evaluate_every": 3,
    }
    assert cli.main(finetune(str(data), keys=keys)) == EXIT_DONE
    scores = json.loads(capfd.readouterr().out)["test"]
    assert scores["mAP"] > 0.7


def test_a_subset_is_what_is_trained_on(data, tmp_path, capfd):
    keys = {
        "run.directory": tmp_path / "run",
        "finetune.per_class": 5,
        "training.batch": 10,
        "stream.passes": 3,
    }
    assert cli.main(finetune(str(data), keys=keys)) == EXIT_DONE
    summary = json.loads(capfd.readouterr().out)
    assert summary["stream"]["manifest"] == summary["images"] == 60
    assert "subset" in summary["shards_url"]
    listed = tmp_path / "keys.txt"
    listed.write_text("".join(f"0_{index}.JPEG\n" for index in range(BATCH)))
    keys = {"run.directory": tmp_path / "listed", "finetune.subset": listed, "stream.passes": 2}
    assert cli.main(finetune(str(data), keys=keys)) == EXIT_DONE
    assert json.loads(capfd.readouterr().out)["images"] == 2 * BATCH


def test_heads_on_a_frozen_trunk_are_told_each_by_its_settings(data, tmp_path, capfd):
    keys = {
        "run.directory": tmp_path / "run",
        "model.init": data / "pretrained",
        "finetune.mode": "frozen",
        "finetune.rates": "[0.3, 0.03]",
        "finetune.weight_decays": "[0]",
        "optimizer.rate": "null",
        "optimizer.schedule": "step",
        "optimizer.milestones": "[0.5]",
    }
    assert cli.main(finetune(str(data), keys=keys)) == EXIT_DONE
    said = capfd.readouterr()
    assert "linear, augmented crops, rate 0.03, weight decay 0, top-1" in said.err
    rates = {json.loads(line)["rate"] for line in said.err.splitlines() if '"progress"' in line}
    assert rates == {0.3, 0.06}
    assert json.loads(said.out)["test"]["top1"] == top1(tmp_path / "run")


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.stem.startswith(("finetune-", "lowshot-"))],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_every_recipe_of_finetuning_is_understood(recipe, capfd):
    assert cli.main(["finetune", "--config", str(recipe), "--print-config"]) == EXIT_DONE
    printed = capfd.readouterr().out
    config = load_config(recipe, base=FINETUNE_BASE)
    assert f"mode: {config.finetune.mode}" in printed
    assert config.run.task == "finetune"


def test_the_papers_finetunings_are_there():
    assert {path.stem for path in RECIPES} >= {
        "finetune-imagenet", "finetune-imagenet-scratch", "finetune-1pct", "finetune-10pct",
        "finetune-places205", "finetune-inat18", "finetune-linear-imagenet", "finetune-resnext101",
        "lowshot-imagenet",
    }  # fmt: skip
