"""Trunks: torchvision's residual networks without classifier, at any width."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from streamswav.config import ModelSection
from streamswav.errors import ConfigError
from streamswav.models.recompute import recompute


@dataclass(frozen=True)
class Architecture:
    """What tells one residual network from another.

    Attributes:
        block: class of the residual blocks.
        depths: blocks of each stage; the smallest trunk has no fourth one.
        groups: of the 3x3 convolutions of bottlenecks.
        group_width: channels of a group at 64 planes.
    """

    block: type[nn.Module]
    depths: tuple[int, int, int, int]
    groups: int = 1
    group_width: int = 64


ARCHITECTURES = {
    "resnet8": Architecture(BasicBlock, (1, 1, 1, 0)),
    "resnet10": Architecture(BasicBlock, (1, 1, 1, 1)),
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_32x16d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 16),
    "resnext101_32x32d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 32),
    "resnext101_32x48d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 48),
}

_STEMS = {"imagenet": (7, 2), "small": (3, 1), "strided": (3, 2)}


class Trunk(ResNet):  # type: ignore[misc]  # torchvision carries no types
    """A residual network whose output is the pooled features; parameter names are torchvision's.

    Args:
        architecture: blocks, depths and groups.
        planes: channels of the stem and the first stage; each later stage doubles them.
        stem: `imagenet` (7x7, stride 2, max-pooling), `small` (3x3, stride 1) or `strided` (3x3, stride 2).

    Attributes:
        feature_dim: F, the number of features.
        recompute_blocks: keep only the inputs of residual blocks for the backward pass (activation
            checkpointing): about a third more computing, a fraction of the memory.
    """

    def __init__(self, architecture: Architecture, *, planes: int, stem: str) -> None:
        # Not ResNet's constructor: it would first build, and fill, a network 64 planes wide.
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation = planes, 1
        self.groups, self.base_width = architecture.groups, architecture.group_width
        kernel, stride = _STEMS[stem]
        self.conv1 = nn.Conv2d(3, planes, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        block, depths = architecture.block, architecture.depths
        self.layer1 = self._make_layer(block, planes, depths[0])
        self.layer2 = self._make_layer(block, planes * 2, depths[1], stride=2)
        self.layer3 = self._make_layer(block, planes * 4, depths[2], stride=2)
        self.layer4 = self._make_layer(block, planes * 8, depths[3], stride=2) if depths[3] else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim: int = self.inplanes
        self.recompute_blocks = False
        initialise_convolutions(self)

    def blocks(self) -> Iterator[nn.Module]:
        """Yield the residual blocks in order."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            yield from stage.children()

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features [B, F] of images [B, 3, S, S]."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for block in self.blocks():
            maps = recompute(block, maps) if self.recompute_blocks else block(maps)
        return torch.flatten(self.avgpool(maps), 1)


def initialise_convolutions(module: nn.Module) -> None:
    """Draw every convolution's weights from Kaiming's normal distribution, fan out, in place."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def build_trunk(section: ModelSection) -> Trunk:
    """Build the trunk that the configuration names.

    `section.width` multiplies every stage and the stem (the paper's w2, w4 and w5, appendix B.2; a
    fraction suits small data). In a grouped network the groups stay and each of them widens.

    Raises:
        ConfigError: an unknown `model.trunk`; a `model.width` that leaves a group without channels.
    """
    architecture = ARCHITECTURES.get(section.trunk)
    if architecture is None:
        close = difflib.get_close_matches(section.trunk, ARCHITECTURES, n=1, cutoff=0)
        raise ConfigError("model.trunk", "there is no such trunk", value=section.trunk, nearest=close[0])
    planes = round(64 * section.width)
    if planes * architecture.group_width < 64:
        reason = f"leaves {section.trunk} without channels; at least {1 / architecture.group_width:g}"
        raise ConfigError("model.width", reason, value=section.width)
    return Trunk(architecture, planes=planes, stem=section.stem)
