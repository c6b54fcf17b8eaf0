"""`ops/recipes/detection` on generated data in COCO's format: it trains, resumes to the bit, counts right."""

import importlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_run import save_tiny_run, tiny_config

from streamswav.config import CropsSection, ModelSection
from streamswav.errors import EXIT_CONFIG, EXIT_DONE
from streamswav.models import build_trunk
from streamswav.transfer.export.constructors import detectron2_settings
from streamswav.transfer.measuring.results_file import read_results

FOLDER = Path(__file__).parents[2] / "ops" / "recipes" / "detection"
CATEGORIES = (3, 7)
COLOURS = ((220, 40, 40), (40, 220, 40))
TINY = (
    "--batch",
    "2",
    "--sizes",
    "64",
    "--longest",
    "96",
    "--channels",
    "8",
    "--warmup",
    "1",
    "--steps",
    "3",
)

# pycocotools' arrays know nothing of numpy 2's copy=False.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield


def draw(folder, count, *, seed):
    """Coloured rectangles, the colour being the category, and one image without any."""
    random = np.random.default_rng(seed)
    images, objects = [], []
    (folder / "images").mkdir(parents=True)
    for number in range(1, count + 2):
        pixels = random.integers(0, 80, (64, 72, 3), dtype=np.uint8)
        for _ in range(2 if number <= count else 0):
            kind, (x, y, wide, high) = int(random.integers(2)), random.integers(14, 30, 4).tolist()
            pixels[y : y + high, x : x + wide] = COLOURS[kind]
            corners = [x, y, x + wide, y, x + wide, y + high, x, y + high]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": CATEGORIES[kind],
                    "bbox": [x, y, wide, high],
                    "area": wide * high,
                    "iscrowd": 0,
                    "segmentation": [corners],
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 72, "height": 64})
    categories = [{"id": each, "name": str(each)} for each in CATEGORIES]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    save_tiny_run(str(folder / "run"), config=tiny_config(stem="imagenet"))
    for number, role in enumerate(("train", "test")):
        draw(folder / role, 4, seed=number)
    places = itertools.chain.from_iterable(
        (
            f"--{role}-images",
            folder / role / "images",
            f"--{role}-annotations",
            folder / role / "instances.json",
        )
        for role in ("train", "test")
    )
    given = ["--weights", folder / "run", *places, "--workers", "0", "--log-every", "1", *TINY]
    return [*map(str, given), "--device", "cpu"]


def run(arguments, out, iterations, *more):
    return importlib.import_module("detect").main(
        [*arguments, "--out", str(out), "--iterations", str(iterations), *more]
    )


@pytest.mark.parametrize("model", ["faster_rcnn", "mask_rcnn"])
def test_a_run_in_two_parts_ends_as_one_in_a_piece_and_is_measured(arguments, tmp_path, capsys, model):
    assert run(arguments, tmp_path / "whole", 3, "--model", model, "--save-every", "1") == EXIT_DONE
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert ("loss_mask" in lines[0]) == (model == "mask_rcnn")
    for iterations in (1, 3):
        assert run(arguments, tmp_path / "parts", iterations, "--model", model) == EXIT_DONE
    later = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in later] == lines
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole["detector"].keys() == parts["detector"].keys()
    assert all(torch.equal(whole["detector"][name], parts["detector"][name]) for name in whole["detector"])
    scores = read_results(str(tmp_path / "whole" / "results.json"), _store()).values[0].scores
    assert {"box_AP", "box_AP50"} <= scores.keys()
    assert ("mask_AP" in scores) == (model == "mask_rcnn")


def _store():
    return importlib.import_module("streamswav.stream.store").Store()


def test_the_trunk_is_the_exports_and_all_of_it_is_trained(arguments, tmp_path):
    before = importlib.import_module("streamswav.transfer").load_trunk(arguments[1]).state_dict()
    assert run(arguments, tmp_path / "out", 0, "--model", "faster_rcnn") == EXIT_DONE
    assert run(arguments, tmp_path / "out", 3, "--model", "faster_rcnn") == EXIT_DONE
    after = torch.load(tmp_path / "out" / "checkpoint.pt")["detector"]
    trained = {name: after[f"backbone.body.{name}"] for name in before}
    assert all(not torch.equal(trained[name], before[name]) for name in before)


def test_what_is_found_where_it_is_counts_full_and_elsewhere_nothing(arguments):
    scores = importlib.import_module("coco_scores")
    data = importlib.import_module("coco_data").CocoImages(
        Path(arguments[7]), Path(arguments[9]), masks=True, train=False
    )
    assert len(data) == 5

    def found(shift):
        for index in range(len(data)):
            _, target = data[index, 0]
            output = {"boxes": target["boxes"] + shift, "labels": target["labels"]}
            output |= {"scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
            yield from scores._in_coco_format(int(target["image_id"]), output, data.categories)

    right = scores.score(data, list(found(0)), masks=True)
    assert right["box_AP"] == right["mask_AP"] == 1
    beside = scores.score(data, list(found(40)), masks=True)
    assert beside["box_AP50"] == 0
    assert beside["mask_AP"] == 1


def test_batches_of_all_ranks_are_the_batches_of_one():
    sampler = importlib.import_module("coco_data").ByIteration
    deal = {"images": 7, "batch": 4, "start": 0, "stop": 6, "seed": 1}
    whole = list(sampler(**deal, rank=0, world=1))
    parts = [list(sampler(**deal, rank=rank, world=2)) for rank in range(2)]
    assert [[*one, *other] for one, other in zip(*parts, strict=True)] == whole
    assert list(sampler(**{**deal, "start": 3}, rank=0, world=1)) == whole[3:]
    dealt = [place for batch in whole for place, _ in batch]
    assert sorted(dealt[:7]) == sorted(dealt[7:14]) == list(range(7))


def test_images_without_objects_are_not_trained_and_boxes_flip_with_their_image(arguments):
    data = importlib.import_module("coco_data").CocoImages(
        Path(arguments[3]), Path(arguments[5]), masks=True, train=True
    )
    assert len(data) == 4
    seen = {tuple(target["boxes"][0].tolist()) for seed in range(12) for _, target in [data[0, seed]]}
    assert len(seen) == 2
    for seed in range(12):
        image, target = data[0, seed]
        for box, mask in zip(target["boxes"].int(), target["masks"], strict=True):
            left, top, right, bottom = box.tolist()
            assert mask[top:bottom, left:right].all()
            assert mask.sum() == (right - left) * (bottom - top)
        last = target["boxes"][-1].int().tolist()
        colour = torch.tensor(COLOURS[int(target["labels"][-1]) - 1]) / 255
        torch.testing.assert_close(image[:, last[1], last[0]], colour)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--rate", "0.5"], "--rate: the run in"),
        (["--batch", "4"], "--batch: the run in"),
        (["--train-annotations", "nowhere.json"], "not in COCO's format"),
        (["--weights", "nowhere.pth"], "nowhere.pth: there is"),
        (["--train-images", "nowhere"], "there is no image 1.png in it"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, tmp_path, capsys, change, reason):
    assert run(arguments, tmp_path / "out", 0, "--model", "faster_rcnn") == EXIT_DONE
    assert run(arguments, tmp_path / "out", 1, "--model", "faster_rcnn", *change) == EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.parametrize("file", sorted((FOLDER / "detectron2").glob("*.yaml")), ids=lambda path: path.stem)
def test_detectron2_settings_fit_what_is_exported_for_it(file):
    model, crops = yaml.safe_load(file.read_text())["MODEL"], CropsSection()
    assert model["PIXEL_MEAN"] == pytest.approx([255 * each for each in crops.mean])
    assert model["PIXEL_STD"] == pytest.approx([255 * each for each in crops.std])
    with torch.device("meta"):
        settings = detectron2_settings(build_trunk(ModelSection()), ModelSection())
    assert settings.items() <= model["RESNETS"].items()
    assert model["BACKBONE"]["FREEZE_AT"] == 0


@pytest.mark.all
def test_two_ranks_train_and_measure_together(arguments, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "detect.py"), *arguments, "--out", str(tmp_path), "--iterations", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["iteration"] for line in done.stdout.splitlines() if line.startswith("{")] == [
        1,
        2,
    ]
    assert read_results(str(tmp_path / "results.json"), _store()).data["test"].images == 5
