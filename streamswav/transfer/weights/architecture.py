"""Which trunk tensors belong to, by their names and shapes alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torchvision.models.resnet import Bottleneck

from streamswav.models import ARCHITECTURES, Trunk
from streamswav.models.trunk import Architecture
from streamswav.transfer.weights.tensors import COUNTER, Shapes, shapes_of

Stem = Literal["imagenet", "small", "strided"]

_ELSEWHERE = {
    "wide_resnet50_2": Architecture(Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": Architecture(Bottleneck, (3, 4, 23, 3), 1, 128),
}
"""Recognised only: their 3x3 convolutions alone are widened, unlike those of the paper's wide networks."""

_ALL = {**ARCHITECTURES, **_ELSEWHERE}
_PLANES = 64
_MOST_PLANES = 64 * _PLANES
_NEAREST = 3
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")


@dataclass(frozen=True)
class Match:
    """A trunk, and what tells the tensors from its own.

    Attributes:
        trunk: its name.
        width: as in `model.width`.
        stem: as in `model.stem`; a 3x3 stem counts as `small`, since strides are not seen in shapes.
        features: F that it gives.
        tensors: how many it has, without the counters of batch norms.
        missing: names of its tensors that are not there.
        reshaped: names with the shape it should be and the shape that it is.
        extra: names that the trunk has no place for.
        counters: names of all its counters of batch norms, there or not.
    """

    trunk: str
    width: float
    stem: Stem
    features: int
    tensors: int
    missing: tuple[str, ...] = ()
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Every tensor has its place, and every place its tensor."""
        return self.differences == 0

    @property
    def differences(self) -> int:
        """Number of tensors that do not fit."""
        return len(self.missing) + len(self.reshaped) + len(self.extra)

    @property
    def built_here(self) -> bool:
        """Whether this is a trunk that can be had by `model.trunk`."""
        return self.trunk in ARCHITECTURES

    def __str__(self) -> str:
        return describe_trunk(self.trunk, self.width, self.stem)

    def explain(self) -> str:
        """Say what differs, in words."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} of {self.tensors} tensors missing, first {self.missing[0]}")
        if self.reshaped:
            name, (wanted, found) = next(iter(self.reshaped.items()))
            first = f"first {name}, which should be {list(wanted)} and is {list(found)}"
            parts.append(f"{len(self.reshaped)} of {self.tensors} tensors of another shape, {first}")
        if self.extra:
            parts.append(f"{len(self.extra)} too many, first {self.extra[0]}")
        return "; ".join(parts)


def describe_trunk(trunk: str, width: float, stem: str) -> str:
    """Name a trunk in words, as `resnet50 at width 2`."""
    return f"{trunk} at width {width:g}" + ("" if stem == "imagenet" else f" with the {stem} stem")


def find_architecture(shapes: Shapes) -> Match:
    """Return the trunk that tensors with these names and shapes belong to, or the nearest one."""
    found = None
    for planes in _guess_planes(shapes):
        possible = [name for name, each in _ALL.items() if planes * each.group_width >= _PLANES]
        possible.sort(key=lambda name: _distance(shapes, _ALL[name], planes))
        for name in possible[:_NEAREST]:
            match = compare(shapes, name, planes / _PLANES, _guess_stem(shapes))
            if match.exact:
                return match
            found = match if found is None or match.differences < found.differences else found
    return found or compare(shapes, "resnet50", 1.0, "imagenet")


def compare(shapes: Shapes, trunk: str, width: float, stem: Stem) -> Match:
    """Hold names and shapes against a trunk of `ARCHITECTURES`; counters of batch norms may be missing."""
    built = _on_meta(trunk, round(_PLANES * width), stem)
    own = shapes_of(built.state_dict())
    wanted = [name for name in own if not name.endswith(COUNTER)]
    both = [name for name in own if name in shapes]
    return Match(
        trunk,
        width,
        stem,
        built.feature_dim,
        len(wanted),
        missing=tuple(name for name in wanted if name not in shapes),
        reshaped={name: (own[name], shapes[name]) for name in both if own[name] != shapes[name]},
        extra=tuple(name for name in shapes if name not in own),
        counters=tuple(name for name in own if name.endswith(COUNTER)),
    )


@functools.lru_cache(maxsize=32)
def _on_meta(trunk: str, planes: int, stem: Stem) -> Trunk:
    with torch.device("meta"):
        return Trunk(_ALL[trunk], planes=planes, stem=stem)


def _guess_planes(shapes: Shapes) -> list[int]:
    """Channels of the first stage, as several tensors tell it; they agree where all is well."""
    told = [
        shapes.get("conv1.weight", ())[:1],
        shapes.get("layer1.0.conv1.weight", ())[1:2],
        shapes.get("layer1.0.conv1.weight", ())[:1],
        shapes.get("bn1.weight", ())[:1],
    ]
    return list(dict.fromkeys(planes for each in told for planes in each if 0 < planes <= _MOST_PLANES))


def _guess_stem(shapes: Shapes) -> Stem:
    return "small" if shapes.get("conv1.weight", ())[-1:] == (3,) else "imagenet"


def _distance(shapes: Shapes, architecture: Architecture, planes: int) -> tuple[int, ...]:
    """How unlike the tensors and a trunk are, by what is seen without building it."""
    bottleneck, found_depths = architecture.block is Bottleneck, _depths(shapes)
    thirds = sum(name.endswith("conv3.weight") for name in shapes)
    other_block = bottleneck != (2 * thirds > sum(found_depths))
    depths = sum(abs(one - other) for one, other in zip(found_depths, architecture.depths, strict=True))
    each = planes * architecture.group_width // _PLANES
    middle = (each * architecture.groups, each) if bottleneck else (planes, planes)
    found = (*shapes.get("layer1.0.conv2.weight", ()), 0, 0)
    return other_block, depths, abs(found[0] - middle[0]), abs(found[1] - middle[1])


def _depths(shapes: Shapes) -> list[int]:
    blocks = {(int(found[1]), int(found[2])) for name in shapes if (found := _BLOCK.match(name))}
    return [sum(stage == number for stage, _ in blocks) for number in range(1, 5)]
