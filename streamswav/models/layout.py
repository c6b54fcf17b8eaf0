"""Names of tensors: ours, and those of the published SwAV weights.

    ours                          published
    trunk.layer1.0.conv1.weight   module.layer1.0.conv1.weight
    projection_head.3.bias        module.projection_head.3.bias
    prototypes.weight             module.prototypes.weight

Within the trunk both use torchvision's names, without its classifier `fc`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_OURS = "trunk."
_PUBLISHED = "module."
_OUTSIDE_TRUNK = ("projection_head.", "prototypes.")


def to_reference_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a `SwAVNetwork` as in the published weights; order and tensors are kept."""
    return {_PUBLISHED + name.removeprefix(_OURS): tensor for name, tensor in state.items()}


def from_reference_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights to the names of a `SwAVNetwork`; `module.` may be missing.

    Nothing is dropped: what the network does not know is reported by its strict `load_state_dict`.
    """
    return {_our_name(name.removeprefix(_PUBLISHED)): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    return name if name.startswith(_OUTSIDE_TRUNK) else _OURS + name
