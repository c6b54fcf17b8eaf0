"""`streamswav knn`, `linear` and `evaluate` on a real checkpoint and real shards."""

import argparse
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import save_tiny_run, tiny_config

from streamswav.commands import evaluate as command
from streamswav.config import Config, CropsSection, LabelsSection, StorageSection
from streamswav.errors import EXIT_CONFIG, CheckpointError, ConfigError, DeniedError
from streamswav.training.distributed import Ranks
from streamswav.transfer.extraction.preprocessing import choose_preprocessing
from streamswav.transfer.measuring.baselines import RawPixels
from streamswav.transfer.measuring.evaluation import Wanted, evaluate
from streamswav.transfer.measuring.labelled_sets import number_classes

CLASSES = 4
PARTS = {
    "knn": (command.add_knn_arguments, command.run_knn),
    "linear": (command.add_linear_arguments, command.run_linear),
    "svm": (command.add_svm_arguments, command.run_svm),
    "evaluate": (command.add_evaluate_arguments, command.run_evaluate),
}


def coloured(number):
    """An image whose class is its colour, under noise."""
    random = np.random.default_rng(number)
    colour = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[number % CLASSES]
    pixels = np.clip(colour + random.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def given(make_shards, tmp_path):
    """A checkpoint with its data, as arguments."""
    save_tiny_run(str(tmp_path / "run"))
    make_shards(tmp_path / "train", counts=[40, 40], image=coloured, kind="PNG", classes=CLASSES)
    make_shards(
        tmp_path / "test", counts=[20], image=lambda i: coloured(1000 + i), kind="PNG", classes=CLASSES
    )
    return [
        *("--checkpoint", str(tmp_path / "run")),
        *("--train", str(tmp_path / "train")),
        *("--test", str(tmp_path / "test")),
        *("--workers", "0"),
    ]


def run(name, arguments, storage=None, given=None):
    add, carry_out = PARTS[name]
    parser = argparse.ArgumentParser()
    add(parser)
    return carry_out(parser.parse_args(arguments), given=given or Config(storage=storage or StorageSection()))


def test_knn_tells_every_k_and_every_column(given, capsys):
    results = run("knn", [*given, "--k", "1", "20", "--baselines", "untrained", "pixels"])
    assert results.value("kNN, k = 20", "pixels").scores == {"top1": 1.0, "top5": 1.0}
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if line.startswith("per cent")] == [
        ["per", "cent", "checkpoint", "untrained", "pixels"]
    ]
    assert "kNN, k = 1, top-1" in out
    assert "100.00" in out


def test_the_table_says_what_it_was_given(given, capsys, tmp_path):
    run("linear", [*given, "--epochs", "2"])
    out = capsys.readouterr().out
    for fact in (
        f"80 images, 4 classes, {tmp_path / 'train'}",
        "20 images, 4 classes",
        "trunk resnet10, width 0.125",
        "step 12, images 3,072",
        "resize 16, crop 16",
        "cached centre-crop features; the paper's protocol augments",
        "last epoch",
    ):
        assert fact in out


def test_usual_neighbours_that_do_not_fit_are_left_out_with_a_line_that_says_so(given, capsys):
    results = run("knn", given)
    assert [value.protocol for value in results.values] == ["kNN, k = 20"]
    events = map(json.loads, capsys.readouterr().err.splitlines())
    (line,) = (each for each in events if each["event"] == "neighbours")
    assert line["message"] == "k = 200 is left out, k = 20 is used: there are only 80 training images"


@pytest.mark.parametrize("counted", [True, False])
def test_neighbours_asked_for_that_do_not_fit_are_refused_before_the_test_images_are_read(
    given, tmp_path, counted
):
    broken = tmp_path / "test" / "shard-000000.tar"
    broken.write_bytes(bytes(1024))
    if counted:
        for shard in (tmp_path / "train").glob("*.tar"):
            shard.write_bytes(bytes(1024))
        counts = {shard.name: {"samples": 40} for shard in (tmp_path / "train").glob("*.tar")}
        (tmp_path / "train" / "_stats.json").write_text(json.dumps({"shards": counts}))
    with pytest.raises(ConfigError, match="--k = 81: there are only 80 training images"):
        run("knn", [*given, "--k", "5", "81"])


def test_linear_learns_what_pixels_tell(given):
    results = run("linear", [*given, "--baselines", "pixels", "--standardise"])
    assert results.value("linear", "pixels").scores["top1"] == 1.0
    assert results.value("linear").settings["standardise"] is True


def test_json_holds_what_the_table_shows(given, tmp_path):
    file = tmp_path / "results.json"
    results = run("evaluate", [*given, "--k", "5", "--epochs", "3", "--json", str(file)])
    read = json.loads(file.read_text())
    assert read["format_version"] == 2
    assert read["model"]["step"] == 12
    assert read["data"]["train"]["images"] == 80
    assert read["seeds"] == {"untrained": 5, "linear": 0}
    assert [value["protocol"] for value in read["values"]] == ["kNN, k = 5", "linear"]
    assert read["values"][0]["scores"] == results.value("kNN, k = 5").scores
    assert read["values"][1]["settings"]["epochs"] == 3


def test_json_on_standard_output_is_alone_there(given, capsys):
    run("knn", [*given, "--k", "5", "--json", "-"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["values"]
    assert "per cent" in captured.err


@pytest.mark.parametrize("place", ["file/below.json", "folder"])
def test_a_place_for_json_that_cannot_be_written_is_found_before_anything_is_read(given, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "test" / "shard-000000.tar").unlink()
    with pytest.raises(DeniedError, match="cannot be written") as caught:
        run("knn", [*given, "--json", str(tmp_path / place)])
    assert caught.value.exit_code == EXIT_CONFIG


def test_looking_whether_json_can_be_written_leaves_all_as_it_was(given, tmp_path):
    (tmp_path / "old.json").write_text("old")
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("old.json", "new.json"):
        with pytest.raises(ConfigError):
            run("knn", [*given, "--k", "81", "--json", str(tmp_path / name)])
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "old.json").read_text() == "old"


def test_protocols_that_are_not_asked_for_are_left_out(given):
    results = run("evaluate", [*given, "--protocols", "knn", "--k", "3"])
    assert [value.protocol for value in results.values] == ["kNN, k = 3"]


def test_baselines_leave_the_checkpoints_own_figures_alone(given):
    arguments = [*given, "--k", "5", "--epochs", "3"]
    alone, beside = run("evaluate", arguments), run("evaluate", [*arguments, "--baselines", "pixels"])
    for protocol in ("kNN, k = 5", "linear"):
        assert beside.value(protocol).scores == alone.value(protocol).scores


def test_the_untrained_column_is_the_run_before_its_first_step(make_shards, given, tmp_path):
    save_tiny_run(str(tmp_path / "begun"), seed=tiny_config().stream.seed)
    trained = run("knn", [*given, "--k", "1", "7", "--baselines", "untrained"])
    begun = run("knn", ["--checkpoint", str(tmp_path / "begun"), *given[2:], "--k", "1", "7"])
    for protocol in ("kNN, k = 1", "kNN, k = 7"):
        assert trained.value(protocol, "untrained").scores == begun.value(protocol).scores


def test_a_bucket_is_read_with_the_endpoint_given_not_with_the_runs_own(given, s3, tmp_path):
    bucket, folder = s3.make_bucket()
    for name in ("train", "test"):
        (tmp_path / name).rename(folder / name)
    config = tiny_config().model_copy(
        update={"storage": StorageSection(endpoint_url="http://127.0.0.1:1", deadline_seconds=1)}
    )
    save_tiny_run(f"{bucket}/run", config=config, storage=s3.section)
    results = evaluate(
        f"{bucket}/run",
        [f"{bucket}/train"],
        [f"{bucket}/test"],
        Wanted(protocols=["knn"], workers=0, knn=command.KnnSettings((5,))),
        storage=s3.section,
    )
    assert results.data["train"].images == 80


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--k", "0"], "too few"),
        (["--temperature", "nan"], "not a number above 0"),
        (["--workers", "-1"], "not a whole number"),
        (["--baselines", "random"], "invalid choice"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, capsys, arguments, reason):
    with pytest.raises(SystemExit):
        run("knn", [*given, *arguments])
    assert reason in capsys.readouterr().err


def test_a_path_without_checkpoint_is_refused(given, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run("knn", ["--checkpoint", str(tmp_path / "train"), *given[2:]])


@pytest.mark.parametrize(
    ("size", "given_sizes", "expected"),
    [
        (224, {}, (256, 224)),
        (96, {}, (110, 96)),
        (32, {}, (32, 32)),
        (224, {"crop": 128}, (146, 128)),
        (224, {"resize": 224}, (224, 224)),
    ],
)
def test_sizes_follow_the_runs_first_crop(size, given_sizes, expected):
    chosen = choose_preprocessing(CropsSection(sizes=[size, 96]), **given_sizes)
    assert (chosen.resize, chosen.crop) == expected


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ConfigError, match="--resize = 100: smaller than the crop"):
        choose_preprocessing(CropsSection(), resize=100)


def test_classes_are_numbered_by_training_and_others_are_unknown():
    train, test, classes = number_classes(
        torch.tensor([900, 7, 7, 12]), torch.tensor([12, 8, 900, 10**12]), Ranks()
    )
    assert (train.tolist(), test.tolist(), classes) == ([2, 0, 0, 1], [1, -1, 2, -1], 3)


def test_raw_pixels_undo_the_normalisation():
    plain = torch.rand(2, 3, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    normalised = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    pixels = RawPixels(8, mean=mean, std=std)(normalised)
    torch.testing.assert_close(pixels, plain.flatten(1))
    assert RawPixels(4, mean=mean, std=std)(normalised).shape == (2, 48)


@pytest.fixture
def several(given, tmp_path):
    """Arguments for images of several labels, in a table; one class is unknown of every third test image."""
    keys = {
        role: (f"{shard}_{index}" for shard in range(2) for index in range(40)) for role in ("train", "test")
    }
    rows = [
        f"{role}/{key},{int(number % 4 in (0, 3))},{int(number % 4 == 1)},{0 if number % 3 else -1}"
        for role, found in keys.items()
        for number, key in enumerate(found)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["key,warm,green,odd", *rows]) + "\n")
    for role in ("train", "test"):
        _rename(tmp_path / role, role)
    section = LabelsSection(file=str(tmp_path / "labels.csv"), label=["warm", "green", "odd"], unknown="-1")
    return given, Config(labels=section)


def _rename(folder, role):
    """Put the role before every key."""
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as old:
            members = [(each, old.extractfile(each).read()) for each in old]
        with tarfile.open(shard, "w") as new:
            for each, data in members:
                each.name = f"{role}/{each.name}"
                new.addfile(each, io.BytesIO(data))


def test_images_of_several_labels_from_a_table_get_average_precision(several):
    given, config = several
    arguments = [*given, "--protocols", "knn", "linear", "svm", "--k", "5", "--epochs", "20", "--costs", "1"]
    results = run("evaluate", [*arguments, "--baselines", "pixels"], given=config)
    for protocol in ("kNN, k = 5", "linear", "svm"):
        value = results.value(protocol, "pixels")
        assert value.scores["mAP"] > 0.9
        assert value.settings["classes_without_a_test_image"] == 1  # nothing is odd
        assert value.intervals["mAP"].method == "bootstrap"
    assert results.data["train"].classes == 3
    assert results.data["train"].labels.endswith("labels.csv")
    assert results.seeds["bootstrap"] == 0


def test_a_grid_shows_the_chosen_head_the_best_one_and_all(given, capsys):
    arguments = [*given, "--epochs", "2", "--rate", "0.001", "0.3", "--weight-decay", "0", "0.01"]
    results = run("linear", arguments)
    chosen = results.value("linear").settings
    assert chosen["chosen"] == "of 4 by 10% of the training images, held out"
    own = f"linear, rate {chosen['rate']:g}, weight decay {chosen['weight_decay']:g}"
    assert results.value(own).scores == results.value("linear").scores
    assert own in capsys.readouterr().out
    best = results.value("linear, best of 4 by the test images (optimistic)")
    assert best.scores["top1"] == max(value.scores["top1"] for value in results.values)
    unchosen = run("linear", [*arguments, "--validation", "0"])
    assert "linear" not in {value.protocol for value in unchosen.values}
    assert unchosen.value(own).scores == results.value(own).scores


def test_training_features_in_half_precision_are_said_to_be(given):
    results = run("knn", [*given, "--k", "5", "--half"])
    exact = run("knn", [*given, "--k", "5"])
    assert results.value("kNN, k = 5").settings["training_features"] == "float16"
    assert results.value("kNN, k = 5").scores["top1"] == pytest.approx(
        exact.value("kNN, k = 5").scores["top1"], abs=0.1
    )


def test_the_same_images_have_the_same_digest_in_whatever_shards(given, make_shards, tmp_path):
    one = run("knn", [*given, "--k", "1"]).data["test"]
    other = run("knn", [*given, "--k", "1", "--test", str(tmp_path / "train")]).data["test"]
    shard = tmp_path / "test" / "shard-000000.tar"
    shard.rename(tmp_path / "test" / "renamed.tar")
    renamed = run("knn", [*given, "--k", "1"]).data["test"]
    assert one.digest == renamed.digest != other.digest
    assert one.shards != renamed.shards
