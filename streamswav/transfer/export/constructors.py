"""Who else can build a trunk: lines of Python for torchvision and timm, settings for detectron2."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from streamswav.config import ModelSection
from streamswav.models import Trunk

TIMM_MODELS = frozenset(
    {
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"),
        *("resnext101_32x4d", "resnext101_32x8d", "resnext101_32x16d", "resnext101_32x32d"),
    }
)

_PLANES = 64
_DETECTRON2_DEPTHS = (18, 34, 50, 101, 152)


def torchvision_lines(trunk: Trunk, section: ModelSection, *, classes: int) -> list[str]:
    """Return lines that make `model`, whose tensors are those of `torchvision.pth`.

    Args:
        trunk: to be built.
        section: it was built from.
        classes: of its classifier; 0 for none.
    """
    if trunk.conv1.out_channels != _PLANES:
        return _own_lines(trunk, section, classes)
    if hasattr(torchvision.models, section.trunk):
        made = f"torchvision.models.{section.trunk}()"
    else:
        widths = f", groups={trunk.groups}, width_per_group={trunk.base_width}" if trunk.groups > 1 else ""
        kind, depths = _block_name(trunk), list(_depths(trunk))
        made = f"torchvision.models.ResNet(torchvision.models.resnet.{kind}, {depths}{widths})"
    return ["import torch, torchvision", f"model = {made}", *_patches(trunk), _fc(trunk, classes)]


def timm_lines(trunk: Trunk, section: ModelSection, *, classes: int) -> list[str]:
    """Return lines that make `model`, whose tensors are those of `timm.pth`; arguments as above."""
    if trunk.conv1.out_channels != _PLANES:
        return _own_lines(trunk, section, classes)
    patches = _patches(trunk)
    if classes and isinstance(trunk.layer4, nn.Identity):
        patches.append(_fc(trunk, classes))
    if section.trunk in TIMM_MODELS:
        made = f'timm.create_model("{section.trunk}", num_classes={classes})'
    else:
        widths = f", cardinality={trunk.groups}, base_width={trunk.base_width}" if trunk.groups > 1 else ""
        block, depths = f"timm.models.resnet.{_block_name(trunk)}", list(_depths(trunk))
        made = f"timm.models.resnet.ResNet({block}, {depths}, num_classes={classes}{widths})"
    return ["import timm, torch", f"model = {made}", *patches]


def is_known_elsewhere(trunk: Trunk) -> bool:
    """Tell whether torchvision and timm can build this trunk: their stems are 64 channels wide."""
    return bool(trunk.conv1.out_channels == _PLANES)


def detectron2_settings(trunk: Trunk, section: ModelSection) -> dict[str, Any] | None:
    """Return detectron2's MODEL.RESNETS for a trunk; None where it cannot build it.

    It knows one stem, five depths, and may be wider in its bottlenecks only.
    """
    depth = _depth_of(section.trunk)
    planes = int(trunk.conv1.out_channels)
    basic = depth in _DETECTRON2_DEPTHS[:2]
    if section.stem != "imagenet" or depth not in _DETECTRON2_DEPTHS or (basic and planes != _PLANES):
        return None
    settings: dict[str, Any] = {"DEPTH": depth, "STRIDE_IN_1X1": False}
    if basic:
        settings["RES2_OUT_CHANNELS"] = planes
    elif planes != _PLANES:
        settings |= {"STEM_OUT_CHANNELS": planes, "RES2_OUT_CHANNELS": 4 * planes}
    width_per_group = int(trunk.layer1[0].conv2.out_channels) // trunk.groups
    if not basic and (trunk.groups, width_per_group) != (1, _PLANES):
        settings |= {"NUM_GROUPS": trunk.groups, "WIDTH_PER_GROUP": width_per_group}
    return settings


def own_section(section: ModelSection) -> str:
    """Return the call that makes the part of a configuration which a trunk is built from."""
    return f'ModelSection(trunk="{section.trunk}", width={section.width:g}, stem="{section.stem}")'


def _own_lines(trunk: Trunk, section: ModelSection, classes: int) -> list[str]:
    return [
        "import torch",
        "from streamswav.config import ModelSection",
        "from streamswav.models import build_trunk",
        f"model = build_trunk({own_section(section)})",
        *([_fc(trunk, classes)] if classes else []),
    ]


def _patches(trunk: Trunk) -> list[str]:
    """What is another here than in the libraries' network of the same name."""
    lines = []
    kernel, stride = trunk.conv1.kernel_size[0], trunk.conv1.stride[0]
    if kernel != 7:
        made = f"torch.nn.Conv2d(3, {_PLANES}, {kernel}, stride={stride}, padding=1, bias=False)"
        lines += [f"model.conv1 = {made}", "model.maxpool = torch.nn.Identity()"]
    if isinstance(trunk.layer4, nn.Identity):
        lines.append("model.layer4 = torch.nn.Identity()")
    return lines


def _fc(trunk: Trunk, classes: int) -> str:
    made = f"Linear({trunk.feature_dim}, {classes})" if classes else "Identity()"
    return f"model.fc = torch.nn.{made}"


def _depths(trunk: Trunk) -> tuple[int, ...]:
    """Blocks of the stages; a stage that is not there counts 1, as it has to be built and replaced."""
    stages = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
    return tuple(1 if isinstance(stage, nn.Identity) else len(stage) for stage in stages)


def _block_name(trunk: Trunk) -> str:
    return "BasicBlock" if isinstance(trunk.layer1[0], BasicBlock) else "Bottleneck"


def _depth_of(name: str) -> int:
    digits = name.removeprefix("resnext").removeprefix("resnet").partition("_")[0]
    return int(digits) if digits.isdecimal() else 0
