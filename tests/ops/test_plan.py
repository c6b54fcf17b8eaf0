"""`streamswav plan`: what it says, for whom, what it refuses; and that the page of plans is what it says."""

import json
from pathlib import Path

import pytest

from streamswav.cli import main

OPS = Path(__file__).parents[2] / "ops"
SUPERVISED = ("finetune-", "lowshot-")
RECIPES = sorted(
    path.stem for path in (OPS / "recipes").glob("*.yaml") if not path.stem.startswith(SUPERVISED)
)
QUICK = ("quickstart", "r50-400ep-2x224")
SMALL = ["--model.trunk", "resnet8", "--crops.sizes", "[32, 16]", "--training.batch", "32", "--gpus", "2"]
EPOCHS_100 = 128_116_700


def plan(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def size(count):
    return f"{count / 1e9:.1f} GB"


def setting(name):
    """A row of the page: recipe, GPUs, their type and the keys that differ."""
    keys = []
    if name == "r50-200ep-256-2x160":
        keys = ["--training.batch", "4096", "--swav.queue_length", "0"]
    gpus, gpu = {"r50w2-400ep": (128, "V100-32GB"), "r50w4-400ep": (64, "V100-32GB")}.get(
        name, (64, "V100-16GB")
    )
    if name == "r50w5-400ep":
        gpus, gpu = 128, "V100-32GB"
    return [OPS / "recipes" / f"{name}.yaml", "--gpus", gpus, "--gpu", gpu, *keys]


def columns(planned):
    """The figures that the page has of a setting, as it has them."""
    allowances = ("context", "workspaces", "communication", "fragments")
    memory = planned["memory"]
    held = memory["total"] - sum(memory["parts"][part] for part in allowances)
    published = planned["speed"]["published_images_per_second"]
    return [
        f"{planned['gpus']} x {planned['local_batch']}",
        f"{planned['parameters']['total'] / 1e6:.1f}M",
        f"{planned['flops']['image'] / 1e9:.1f}",
        size(held),
        size(memory["total"]),
        f"{published:.0f}" if published else "-",
        f"{EPOCHS_100 / published / planned['gpus'] / 3600:.1f} h" if published else "-",
        f"{planned['duration']['hours_per_million_images'] * EPOCHS_100 / 1e6:.1f} h",
    ]


def page():
    """Cells of every row of the page's first table, by recipe."""
    found = {}
    for line in (OPS / "plans.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[0].strip("`") in RECIPES:
            found[cells[0].strip("`")] = cells[1:]
    return found


@pytest.mark.parametrize(
    "recipe", [each if each in QUICK else pytest.param(each, marks=pytest.mark.all) for each in page()]
)
def test_the_page_says_what_plan_says(recipe, capsys):
    assert page()[recipe][:8] == columns(plan(capsys, *setting(recipe)))


def test_the_page_has_the_papers_settings():
    assert {"r50-200ep-4096", "r50-400ep-2x224", "r50-200ep-256-2x160", "r50w5-400ep"} <= set(page())


@pytest.mark.parametrize(
    "recipe", [each if each in QUICK else pytest.param(each, marks=pytest.mark.all) for each in RECIPES]
)
def test_every_recipe_can_be_planned(recipe, capsys):
    planned = plan(capsys, OPS / "recipes" / f"{recipe}.yaml", "--gpus", 4, "--hourly-rate", 2)
    assert planned["memory"]["total"] == sum(planned["memory"]["parts"].values())
    assert planned["parameters"]["total"] == sum(
        planned["parameters"][part] for part in ("trunk", "head", "prototypes")
    )
    assert planned["duration"]["price_per_million_images"] > 0
    assert 4 in planned["fit"]["world_sizes"]


def test_in_words_it_says_all_of_it(capsys):
    assert main(["plan", *SMALL, "--gpu", "l4", "--samples", "1e6", "--hourly-rate", "0.5"]) == 0
    said = capsys.readouterr()
    words = [line.split()[0] for line in said.out.splitlines() if not line.startswith(" ")]
    assert words == [
        "plan", "parameters", "a", "memory", "speed", "loader", "network", "run", "bucket", "checkpoint",
        "resumes", "assumed:", "assumed:", "assumed:",
    ]  # fmt: skip
    assert "plan for 2 x L4: batch 32, 16 a GPU" in said.out
    assert "1,000,000 images, 31,250 steps" in said.out
    assert said.err == ""


def test_what_is_not_known_is_said_and_left_out(capsys):
    planned = plan(capsys, *SMALL)
    assert (planned["reading"], planned["duration"]["hours"]) == (None, None)
    assert any("number of samples is not known" in each for each in planned["assumptions"])


def test_shards_are_listed_only_on_demand(make_shards, tmp_path, capsys):
    make_shards(tmp_path, counts=[5, 7])
    planned = plan(capsys, *SMALL, "--stream.urls", tmp_path, "--stream.passes", 3, "--list")
    whole = 3 * sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert (planned["reading"]["bytes"], planned["reading"]["listed"]) == (whole, True)
    assert plan(capsys, *SMALL, "--stream.urls", "s3://nowhere.invalid/")["reading"] is None


def test_a_file_may_come_before_and_after_keys(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("training: {batch: 64}\n")
    given = ["--model.trunk", "resnet8", "--gpus", "2", "--crops.sizes", "[32, 16]"]
    assert plan(capsys, tmp_path / "run.yaml", *given)["batch"] == 64
    assert plan(capsys, *given, tmp_path / "run.yaml", "--training.batch", "32")["batch"] == 32
    assert plan(capsys, *given, "--config", tmp_path / "run.yaml")["local_batch"] == 32


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.yaml"], "no such file"),
        (["a.yaml", "b.yaml"], "takes one configuration"),
        (["--gpu", "V100"], "say which one: V100-16GB, V100-32GB"),
        (["--gpu", "H1000"], "did you mean H100-80GB?"),
        (["--gpus", "0"], "--gpus = 0: must be positive"),
        (["--gpus", "3", "--training.batch", "32"], "must be a multiple of the 3 ranks"),
        (["--hourly-rate", "-1"], "--hourly-rate = -1.0: must be positive"),
        (["--hourly-rate", "nan"], "must be positive"),
        (["--efficiency", "2"], "--efficiency = 2.0"),
        (["--samples", "0"], "--samples = 0"),
        (["--samples", "many"], "--samples"),
        (["--list"], "needs stream.urls"),
        (["--model.trunk", "resnet51"], "did you mean resnet50?"),
        (["--swav.epsilom", "1"], "did you mean swav.epsilon?"),
    ],
)
def test_a_mistake_is_one_line_and_78(arguments, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["plan", *arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (78, "", 1)
    assert reason in said.err
