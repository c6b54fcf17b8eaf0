"""Weights that pretraining begins with: the trunk, and head and prototypes where they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from streamswav.config import ModelSection, StorageSection
from streamswav.errors import CheckpointError
from streamswav.models import SwAVNetwork, build_trunk
from streamswav.transfer.weights.architecture import describe_trunk
from streamswav.transfer.weights.tensors import COUNTER, Shapes, shapes_of, to_float
from streamswav.transfer.weights.trunks import Weights, read_weights

_HEAD, _PROTOTYPES = "projection_head.", "prototypes.weight"


def read_initial(path: str, model: ModelSection, *, storage: StorageSection) -> Weights:
    """Read weights for a run whose network is `model`.

    Raises:
        ConfigError: there is no such model.
        CheckpointError, StorageError: as `read_weights`; also where the trunk is another than the model's.
    """
    with torch.device("meta"):
        wanted = shapes_of(build_trunk(model).state_dict())
    weights, asked = read_weights(path, storage=storage), describe_trunk(model.trunk, model.width, model.stem)
    if not _same(wanted, shapes_of(weights.trunk)):
        there = weights.info.config.model
        keys = f"model.trunk {there.trunk}, model.width {there.width:g}, model.stem {there.stem}"
        raise CheckpointError(
            f"{weights.info.url} holds {weights.info.report.trunk}, but the run's network is {asked}: "
            f"set {keys}, or let it begin with other weights (model.init)"
        )
    # Where a file does not tell the stride of its stem, the configuration does.
    report = replace(weights.info.report, trunk=asked, notes=())
    return replace(weights, info=replace(weights.info, report=report))


def begin_with(network: SwAVNetwork, weights: Weights) -> list[str]:
    """Give a network its first weights, in place, and say what it took and what stays as it was drawn.

    The trunk is taken in any case. Prototypes are taken with the head whose embeddings they lie among, or
    not at all.

    Args:
        network: with the trunk that the weights are of.
        weights: as `read_initial` gives them.

    Raises:
        CheckpointError: head or prototypes are there and hold what are no numbers.
    """
    own = shapes_of(network.state_dict())
    there = shapes_of(weights.beside)
    head = {name: shape for name, shape in own.items() if name.startswith(_HEAD)}
    found = {name: shape for name, shape in there.items() if name.startswith(_HEAD)}
    taken = list(found) if found and _same(head, found) else []
    told = [f"the projection head is {'taken' if taken else f'drawn anew ({_why_no_head(head, found)})'}"]
    if taken and there.get(_PROTOTYPES) == own[_PROTOTYPES]:
        taken.append(_PROTOTYPES)
        told.append("the prototypes are taken")
    else:
        told.append(f"the prototypes are drawn anew ({_why_no_prototypes(own, there, head=bool(taken))})")
    beside = to_float({name: weights.beside[name] for name in taken}, weights.info.url)
    trunk = {f"trunk.{name}": tensor for name, tensor in weights.trunk.items()}
    _copy(network, {**trunk, **beside})
    return told


def _same(wanted: Shapes, found: Shapes) -> bool:
    """Compare but for counters of batch norms, which may be missing."""
    return all(found.get(name) == shape for name, shape in wanted.items() if not name.endswith(COUNTER)) and (
        found.keys() <= wanted.keys()
    )


def _copy(network: SwAVNetwork, state: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _why_no_head(wanted: Shapes, found: Shapes) -> str:
    if not found:
        return "there is none that a network of this trunk can have"
    for name, shape in wanted.items():
        if found.get(name) != shape and not name.endswith(COUNTER):
            there = list(found[name]) if name in found else "missing"
            return f"{name} is {there} there and {list(shape)} here"
    return "it has more layers there"


def _why_no_prototypes(own: Shapes, there: Shapes, *, head: bool) -> str:
    if _PROTOTYPES not in there:
        return "there are none"
    if not head:
        return "they belong to the head that is not taken"
    return f"{there[_PROTOTYPES][0]:,} there, {own[_PROTOTYPES][0]:,} here"
