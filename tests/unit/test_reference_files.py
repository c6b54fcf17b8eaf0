"""Files as the published ones are, and models of torchvision and timm with the values of their files."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from streamswav.transfer.weights.architecture import find_architecture
from streamswav.transfer.weights.heads import read_heads
from streamswav.transfer.weights.layouts import find_trunk
from streamswav.transfer.weights.tensors import shapes_of
from streamswav.transfer.weights.trunks import open_network, open_trunk

GOLDENS = Path(__file__).parents[1] / "goldens" / "reference_checkpoint_tensors.json"
REFERENCE = json.loads(GOLDENS.read_text())
WIDTHS = {"resnet50": 1, "resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

COMMON = ["resnet18", "resnet50"]
LARGE = ["resnet34", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"]
OF_TIMM = ["resnext101_32x4d", "resnext101_32x16d", "resnext101_32x32d"]


def random_values(shapes, seed=0):
    """Tensors of these names and shapes through which numbers stay of their size."""
    random = torch.Generator().manual_seed(seed)
    return {name: random_value(name, tuple(shape), random) for name, shape in shapes.items()}


def random_value(name, shape, random):
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return 0.5 + torch.rand(shape, generator=random)
    scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.empty(shape).normal_(std=scale, generator=random)


@pytest.mark.parametrize("name", REFERENCE)
def test_names_and_shapes_of_the_published_files_are_taken_completely(name):
    shapes = REFERENCE[name]["tensors"]
    found = find_trunk({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    match = find_architecture(shapes_of(found.trunk))
    assert match.exact
    assert (match.trunk, match.width, match.stem) == ("resnet50", WIDTHS[name], "imagenet")
    beside, taken, model = read_heads(found.rest, features=match.features)
    assert len(found.trunk) + len(taken) == len(shapes)
    if REFERENCE[name]["trunk_only"]:
        assert not beside
    else:
        described = {"head_hidden": REFERENCE[name]["head_hidden"], "head_batch_norm": True, "embedding": 128}
        assert model == described
        assert beside["prototypes.weight"].shape == (3000, 128)


@pytest.mark.parametrize(
    "name", [each if each == "resnet50" else pytest.param(each, marks=pytest.mark.all) for each in REFERENCE]
)
def test_files_of_the_published_layout_load_completely(tmp_path, name):
    values = random_values(REFERENCE[name]["tensors"])
    torch.save(values, tmp_path / "swav.pth.tar")
    open_it = open_trunk if REFERENCE[name]["trunk_only"] else open_network
    module, info = open_it(str(tmp_path / "swav.pth.tar"))
    trunk = getattr(module, "trunk", module)
    assert sum(each.numel() for each in trunk.parameters()) == REFERENCE[name]["trunk_parameters"]
    assert sum(each.numel() for each in module.parameters()) == REFERENCE[name]["parameters"]
    assert info.report.left_over == {}
    for own, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, values.pop(f"module.{own}"))
    if module is not trunk:
        for own, tensor in module.state_dict().items():
            assert own.startswith("trunk.") or torch.equal(tensor, values.pop(f"module.{own}"))
    assert not values
    if WIDTHS[name] == 1:
        theirs = torchvision.models.resnet50()
        theirs.fc = torch.nn.Identity()
        theirs.load_state_dict(trunk.state_dict())
        torch.testing.assert_close(trunk(IMAGES), theirs.eval()(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((torchvision.models.get_model, name) for name in COMMON),
        *((timm.create_model, name) for name in COMMON),
        *(pytest.param(torchvision.models.get_model, name, marks=pytest.mark.all) for name in LARGE),
        *(pytest.param(timm.create_model, name, marks=pytest.mark.all) for name in [*LARGE, *OF_TIMM]),
    ],
)
def test_features_are_those_of_the_model_that_saved_the_file(tmp_path, make, name):
    theirs = make(name)
    theirs.load_state_dict(random_values(shapes_of(theirs.state_dict())))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    theirs.fc = torch.nn.Identity()
    trunk, info = open_trunk(str(tmp_path / "weights.pth"))
    torch.testing.assert_close(trunk(IMAGES), theirs.eval()(IMAGES), rtol=1e-5, atol=1e-5)
    assert info.config.model.trunk == name
    assert info.report.left_over == {"fc": 2}
