from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from streamswav.config import ModelSection
from streamswav.errors import ConfigError
from streamswav.models import Trunk, build_trunk

TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
TORCHVISION += ["resnext50_32x4d", "resnext101_32x8d"]


def on_meta(**keys: object) -> Trunk:
    with torch.device("meta"):
        return build_trunk(ModelSection.model_validate(keys))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("width", "published"), [(1, 23_508_032), (2, 93_907_072), (4, 375_378_176), (5, 586_450_240)]
)
def test_wide_trunks_have_the_published_number_of_parameters(width: float, published: int) -> None:
    trunk = on_meta(trunk="resnet50", width=width)
    assert parameters(trunk) == published
    assert trunk.feature_dim == 2048 * width


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions_without_classifier(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).state_dict()
    expected = {key: tensor.shape for key, tensor in theirs.items() if not key.startswith("fc.")}
    assert {key: tensor.shape for key, tensor in on_meta(trunk=name).state_dict().items()} == expected


def test_features_are_those_of_torchvisions_network() -> None:
    theirs = torchvision.models.resnet18().eval()
    theirs.fc = nn.Identity()
    trunk = build_trunk(ModelSection(trunk="resnet18")).eval()
    trunk.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(trunk(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnext101_32x4d", 128),
        ("resnext101_32x16d", 512),
        ("resnext101_32x32d", 1024),
        ("resnext101_32x48d", 1536),
    ],
)
def test_resnext_names_give_groups_and_their_width(name: str, channels: int) -> None:
    convolution = on_meta(trunk=name).get_submodule("layer1.0.conv2")
    assert isinstance(convolution, nn.Conv2d)
    assert (convolution.groups, convolution.out_channels) == (32, channels)


@pytest.mark.parametrize(("width", "channels"), [(0.25, 32), (0.3, 32), (0.5, 64), (1, 128), (2, 256)])
def test_width_widens_each_group_and_keeps_their_number(width: float, channels: int) -> None:
    trunk = on_meta(trunk="resnext50_32x4d", width=width)
    convolution = trunk.get_submodule("layer1.0.conv2")
    assert isinstance(convolution, nn.Conv2d)
    assert (convolution.groups, convolution.out_channels) == (32, channels)
    assert trunk.feature_dim == 32 * round(64 * width)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_a_narrow_trunk_runs_at_both_crop_sizes(stem: str) -> None:
    trunk = build_trunk(ModelSection.model_validate({"trunk": "resnet10", "width": 0.25, "stem": stem}))
    assert trunk.feature_dim == 128
    for size in (32, 24):
        assert trunk(torch.randn(2, 3, size, size)).shape == (2, 128)


def test_the_small_stem_keeps_the_resolution() -> None:
    trunk = build_trunk(ModelSection(trunk="resnet10", width=0.25, stem="small"))
    images = torch.randn(1, 3, 32, 32)
    assert trunk.maxpool(trunk.conv1(images)).shape[-2:] == (32, 32)


def test_convolutions_are_drawn_by_fan_out() -> None:
    trunk = build_trunk(ModelSection(trunk="resnet18"))
    weight = trunk.get_parameter("layer3.0.conv1.weight")
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    norm = trunk.get_submodule("layer3.0.bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert bool((norm.weight == 1).all())
    assert bool((norm.bias == 0).all())


def test_an_unknown_trunk_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="resnet50") as error:
        on_meta(trunk="resnet-50")
    assert (error.value.key, error.value.nearest) == ("model.trunk", "resnet50")


def test_torchvisions_wide_resnet_is_not_mistaken_for_a_wide_trunk() -> None:
    with pytest.raises(ConfigError):
        on_meta(trunk="wide_resnet50_2")


@pytest.mark.parametrize(("name", "width"), [("resnet50", 0.001), ("resnext50_32x4d", 0.2)])
def test_a_width_without_channels_is_refused(name: str, width: float) -> None:
    with pytest.raises(ConfigError) as error:
        on_meta(trunk=name, width=width)
    assert error.value.key == "model.width"
