"""Names of exported tensors, and who else builds the network that they belong to."""

import itertools
import json
from pathlib import Path

import pytest
import timm
import torch

from streamswav.config import ModelSection
from streamswav.models import ARCHITECTURES, build_network, build_trunk
from streamswav.transfer.export.constructors import (
    TIMM_MODELS,
    detectron2_settings,
    is_known_elsewhere,
    timm_lines,
    torchvision_lines,
)
from streamswav.transfer.weights.names import from_detectron2, to_detectron2, to_reference, to_torchvision

GOLDENS = json.loads(
    (Path(__file__).parents[1] / "goldens" / "reference_checkpoint_tensors.json").read_text()
)
WIDTHS = {"resnet50": 1, "resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}

QUICK = ("resnet8", "resnet50", "resnext101_32x4d")


def meta_trunk(**section):
    with torch.device("meta"):
        return build_trunk(ModelSection(**section))


def shapes(state):
    return {name: list(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_authors_layout_is_theirs_to_the_last_name(name):
    golden = GOLDENS[name]
    section = ModelSection(width=WIDTHS[name], head_hidden=golden["head_hidden"] or 0)
    with torch.device("meta"):
        network = build_network(section, prototypes=3000)
    state = network.state_dict()
    beside = {name: each for name, each in state.items() if not name.startswith("trunk.")}
    if golden["trunk_only"]:
        beside = {}
    found = shapes(to_reference(network.trunk.state_dict(), beside))
    assert found == golden["tensors"]
    assert list(found) == list(golden["tensors"])


def test_a_projection_head_of_one_layer_has_no_number_in_the_authors_layout():
    beside = {"projection_head.0.weight": torch.ones(2, 3), "prototypes.weight": torch.ones(4, 2)}
    assert set(to_reference({}, beside)) == {"module.projection_head.weight", "module.prototypes.weight"}


def test_a_classifier_is_fc_in_torchvisions_layout_and_missing_in_the_authors():
    classifier = {"weight": torch.ones(4, 2), "bias": torch.ones(4)}
    assert set(to_torchvision({"bn1.bias": torch.ones(1)}, classifier)) == {
        "bn1.bias",
        "fc.weight",
        "fc.bias",
    }
    assert to_reference({}, {"head.heads.0.weight": torch.ones(4, 2)}) == {}


def test_detectron2_names_are_those_of_its_resnet50():
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convolutions = ["stem.conv1"]
    for stage, depth in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block, layer in itertools.product(range(depth), ("conv1", "conv2", "conv3", "shortcut")):
            if layer != "shortcut" or block == 0:
                convolutions.append(f"res{stage}.{block}.{layer}")
    expected = {f"{each}.weight" for each in convolutions}
    expected |= {f"{each}.norm.{part}" for each in convolutions for part in norms}
    assert set(to_detectron2(meta_trunk().state_dict())) == expected


@pytest.mark.parametrize("name", ["resnet8", "resnet34", "resnet50"])
def test_detectron2_names_come_back_as_they_were(name):
    state = meta_trunk(trunk=name).state_dict()
    assert list(from_detectron2(to_detectron2(state))) == list(state)


def test_timm_has_the_models_it_is_said_to_have():
    assert {name for name in ARCHITECTURES if timm.is_model(name)} == TIMM_MODELS


@pytest.mark.parametrize("lines", [torchvision_lines, timm_lines])
@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.all) for name in ARCHITECTURES if name not in QUICK)],
)
def test_the_lines_build_a_network_of_the_same_tensors(name, lines):
    for stem, classes in (("imagenet", 0), ("strided", 7)):
        section = ModelSection(trunk=name, stem=stem)
        trunk = meta_trunk(trunk=name, stem=stem)
        made = {}
        with torch.device("meta"):
            exec("\n".join(lines(trunk, section, classes=classes)), made)
        features = trunk.feature_dim
        fc = {"fc.weight": [classes, features], "fc.bias": [classes]} if classes else {}
        assert shapes(made["model"].state_dict()) == shapes(trunk.state_dict()) | fc


@pytest.mark.parametrize("stem", ["small", "strided"])
@pytest.mark.parametrize("lines", [torchvision_lines, timm_lines])
def test_the_lines_build_a_network_that_computes_the_same(stem, lines):
    section = ModelSection(trunk="resnet8", stem=stem)
    trunk = build_trunk(section).eval()
    made = {}
    exec("\n".join(lines(trunk, section, classes=0)), made)
    made["model"].load_state_dict(trunk.state_dict())
    images = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(made["model"].eval()(images), trunk(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, 0.5])
def test_a_width_that_others_do_not_know_is_built_by_our_own(width):
    section = ModelSection(trunk="resnet18", width=width)
    trunk = meta_trunk(trunk="resnet18", width=width)
    assert not is_known_elsewhere(trunk)
    made = {}
    with torch.device("meta"):
        exec("\n".join(torchvision_lines(trunk, section, classes=3)), made)
    assert shapes(made["model"].state_dict())["fc.weight"] == [3, trunk.feature_dim]


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnext101_32x8d"])
def test_detectron2_settings_give_the_channels_of_the_trunk(name, width):
    section = ModelSection(trunk=name, width=width)
    trunk = meta_trunk(trunk=name, width=width)
    settings = detectron2_settings(trunk, section)
    assert settings["DEPTH"] == {6: 50, 23: 101, 36: 152}[len(trunk.layer3)]
    given = {
        "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256,
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
    } | settings
    assert given["STEM_OUT_CHANNELS"] == trunk.conv1.out_channels
    assert given["RES2_OUT_CHANNELS"] == trunk.layer1[0].conv3.out_channels
    assert given["NUM_GROUPS"] * given["WIDTH_PER_GROUP"] == trunk.layer1[0].conv2.out_channels
    assert given["NUM_GROUPS"] == trunk.layer1[0].conv2.groups


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_detectron2_wants_to_be_told_the_channels_of_basic_blocks(name):
    settings = detectron2_settings(meta_trunk(trunk=name), ModelSection(trunk=name))
    assert settings == {"DEPTH": int(name[6:]), "STRIDE_IN_1X1": False, "RES2_OUT_CHANNELS": 64}


@pytest.mark.parametrize(
    "section",
    [{"trunk": "resnet10"}, {"stem": "small"}, {"trunk": "resnet18", "width": 0.5}, {"trunk": "resnet8"}],
)
def test_what_detectron2_cannot_build_has_no_settings(section):
    assert detectron2_settings(meta_trunk(**section), ModelSection(**section)) is None
