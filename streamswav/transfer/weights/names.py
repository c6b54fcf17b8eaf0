"""Names of tensors in the files of others, both ways: what exports write and `load_trunk` reads back.

    torchvision, timm     conv1.weight        layer1.0.bn2.bias          layer1.0.downsample.0.weight
    the published SwAV    module.conv1.weight module.layer1.0.bn2.bias   module.projection_head.3.weight
    detectron2            stem.conv1.weight   res2.0.conv2.norm.bias     res2.0.shortcut.weight

detectron2's names as its own converter of torchvision's weights gives them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

State = dict[str, Tensor]

_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
_SWAV = ("projection_head.", "prototypes.")
_LONE_LAYER = "projection_head.0."
_STEM = "stem.conv1.norm.weight"
_TO_DETECTRON2: tuple[_Rule, ...] = (
    (re.compile(r"^(?!layer\d)"), "stem."),
    (re.compile(r"^layer(\d)"), lambda found: f"res{int(found[1]) + 1}"),
    (re.compile(r"\bbn(\d)\b"), r"conv\1.norm"),
    (re.compile(r"\bdownsample\.0\b"), "shortcut"),
    (re.compile(r"\bdownsample\.1\b"), "shortcut.norm"),
)
_FROM_DETECTRON2: tuple[_Rule, ...] = (
    (re.compile(r"^stem\."), ""),
    (re.compile(r"^res(\d)"), lambda found: f"layer{int(found[1]) - 1}"),
    (re.compile(r"\bconv(\d)\.norm\b"), r"bn\1"),
    (re.compile(r"\bshortcut\.norm\b"), "downsample.1"),
    (re.compile(r"\bshortcut\b"), "downsample.0"),
)


def to_torchvision(trunk: Mapping[str, Tensor], classifier: Mapping[str, Tensor]) -> State:
    """Return a trunk as torchvision and timm name it, with its classifier as `fc`.

    Args:
        trunk: tensors of a `Trunk`.
        classifier: `weight` and `bias`; empty for none.
    """
    return {**trunk, **{f"fc.{name}": tensor for name, tensor in classifier.items()}}


def to_reference(trunk: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> State:
    """Return trunk, projection head and prototypes as the published SwAV weights name them.

    A projection head of a single layer has no number there. A finetuned network's classifier has no place.

    Args:
        trunk: tensors of a `Trunk`.
        beside: the network's other tensors, as a checkpoint names them.
    """
    swav = {name: tensor for name, tensor in beside.items() if name.startswith(_SWAV)}
    if not any(name.startswith("projection_head.3.") for name in swav):
        swav = {name.replace(_LONE_LAYER, "projection_head."): tensor for name, tensor in swav.items()}
    return {f"module.{name}": tensor for name, tensor in {**trunk, **swav}.items()}


def to_detectron2(trunk: Mapping[str, Tensor]) -> State:
    """Return a trunk as detectron2's ResNet names it; it has no classifier."""
    return {_rename(name, _TO_DETECTRON2): tensor for name, tensor in trunk.items()}


def from_detectron2(state: Mapping[str, Tensor]) -> State:
    """Undo `to_detectron2`, whatever stands before the names; empty for a file of another layout.

    Other tensors keep their names.
    """
    prefix = next((name.removesuffix(_STEM) for name in state if name.endswith(_STEM)), None)
    if prefix is None:
        return {}
    own = {
        name: _rename(name.removeprefix(prefix), _FROM_DETECTRON2)
        for name in state
        if name.startswith(prefix)
    }
    return {own.get(name, name): tensor for name, tensor in state.items()}


def _rename(name: str, rules: Iterable[_Rule]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name
