"""Where in a file the trunk lies, and what lies beside it: found by the names of the tensors.

A trunk is told by names that no layout changes (`layer1.0.conv1.weight` and its kin); what stands before them
is its prefix, whatever it was wrapped in and saved below. `LAYOUTS` gives prefixes their names and says which
one is meant where a file holds several trunks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from streamswav.errors import CheckpointError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """One way to lay down weights.

    Attributes:
        name: whose it is.
        prefix: pattern of what stands before `conv1.weight`, in the names of nested containers.
        beside: pattern of a name that has to be there too.
    """

    name: str
    prefix: str
    beside: str = ""

    def fits(self, prefix: str, names: Iterable[str]) -> bool:
        """Tell whether a trunk with this prefix, in a file of these names, is laid down so."""
        if not re.fullmatch(self.prefix, prefix):
            return False
        return not self.beside or any(re.search(self.beside, name) for name in names)


_SAVED = r"((state_dict|model|model_state_dict|network|net)\.)?(module\.)?"
_MOVING = r"momentum|moving|target|teacher|student|ema\b|_ema|encoder_k|key"

LAYOUTS = (
    Layout("streamswav", r"(network\.)?trunk\."),
    Layout("VISSL", r"(.*\.)?_feature_blocks\."),
    Layout("DINO", r"teacher\.(module\.)?(backbone\.)?"),
    Layout("MoCo v3", r"(.*\.)?base_encoder\."),
    Layout("MoCo v2", r"(.*\.)?encoder_q\."),
    Layout("timm, moving average", r"(state_dict_ema|model_ema)\.(module\.)?"),
    Layout("SwAV", _SAVED, beside=r"(^|\.)(projection_head|prototypes)\."),
    Layout("torchvision", _SAVED),
    Layout("torchvision's names", rf"(?!.*({_MOVING})).*"),
    Layout("torchvision's names", r".*"),
)
"""In order of preference: the first that fits one of a file's trunks is taken."""

GROUPS = (
    ("optimizer", r"^(optimizer|optim|scheduler|scaler|amp|.*scaler)\b|\.optimizer\."),
    ("queue", r"(^|\.)(\w*_)?queue"),
    ("prototypes", r"(^|\.)prototypes?\b|(^|\.)prototypes\d"),
    ("head", r"(^|\.)(\w*head\w*|projector|predictor)\."),
    ("fc", r"(^|\.)(fc|classifier)\."),
    ("loss", r"(^|\.)(\w*_)?(loss|criterion)\."),
)
"""What is not of the trunk, by pattern; the first that fits counts."""

_OF_TRUNK = re.compile(
    r"(?P<prefix>(?:.*?[.])??)layer\d+\.\d+\.(?:conv|bn|downsample\.)\d+\."
    r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
)
_PART_OF_TRUNK = re.compile(r"(conv|bn|norm|gn|layer|stem|downsample|attnpool)\d*$")
_SHOWN = 3


@dataclass(frozen=True)
class Found:
    """A trunk in a file.

    Attributes:
        layout: its name.
        prefix: what stands before the trunk's names.
        trunk: its tensors, without the prefix.
        rest: all other tensors.
        others: prefixes of trunks that were not taken.
    """

    layout: str
    prefix: str
    trunk: dict[str, Tensor]
    rest: dict[str, Tensor]
    others: tuple[str, ...]

    def count(self, names: Iterable[str]) -> dict[str, int]:
        """Count tensors of the rest by group: other trunks by their prefix, `GROUPS`, and others."""
        return dict(Counter(self._other(name) or group_of(name) for name in names))

    def _other(self, name: str) -> str:
        """The prefix of the other trunk that a tensor lies beside, if it does."""
        beside = [each for each in self.others if each and name.startswith(each)]
        return next((each.rstrip(".") for each in beside if not self.prefix.startswith(each)), "")


def group_of(name: str) -> str:
    """Tell which of `GROUPS` a tensor belongs to, or `other`."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def find_trunk(tensors: Tensors) -> Found:
    """Find the trunk that is meant, whole or not.

    Raises:
        CheckpointError: there is none, or several of equal right.
    """
    prefixes = dict.fromkeys(found["prefix"] for name in tensors if (found := _OF_TRUNK.fullmatch(name)))
    if not prefixes:
        shown = ", ".join(list(tensors)[:_SHOWN])
        raise CheckpointError(
            f"none of its {len(tensors)} tensors has a name of a residual network's trunk as torchvision "
            f"names them (layer1.0.conv1.weight and so on); they begin with {shown}"
        )
    for layout in LAYOUTS:
        fitting = [prefix for prefix in prefixes if layout.fits(prefix, tensors)]
        if len(fitting) > 1:
            shown = ", ".join(prefix + "conv1.weight" for prefix in fitting[:_SHOWN])
            raise CheckpointError(
                f"it holds {len(fitting)} trunks ({shown}); save the one that is meant alone"
            )
        if fitting:
            return _split(tensors, layout.name, fitting[0], [each for each in prefixes if each != fitting[0]])
    raise AssertionError("the last layout fits everything")


def _split(tensors: Tensors, layout: str, prefix: str, others: list[str]) -> Found:
    trunk, rest = {}, {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and _PART_OF_TRUNK.match(short.partition(".")[0]):
            trunk[short] = tensor
        else:
            rest[name] = tensor
    return Found(layout, prefix, trunk, rest, tuple(others))
