"""Projection heads and prototypes of others, under the names of a `SwAVNetwork`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamswav.models import ProjectionHead
from streamswav.transfer.weights.tensors import COUNTER, Tensors

_HEAD = re.compile(r"(?P<place>(?:.*\.)?)projection_head\.(?:(?P<layer>\d+)\.)?(?P<kind>\w+)")
_PROTOTYPES = re.compile(r"(?:.*\.)?prototypes(?:\.prototypes)?\d*\.\w+")
_PLACES = {(False,): (0,), (False, True, False): (0, 1, 3), (False, False): (0, 3)}
"""Numbers of layers in a `ProjectionHead`, by which of them are batch norms."""


def read_heads(rest: Mapping[str, Tensor], *, features: int) -> tuple[Tensors, list[str], dict[str, Any]]:
    """Return `projection_head.*` and `prototypes.weight` as far as a `SwAVNetwork` has a place for them.

    The layers of a head are told by their order: linear, batch norm or none, ReLU, linear; or linear alone.
    So heads without batch norm fit whatever number their last layer has, and a lone layer needs none.

    Args:
        rest: tensors that are not of the trunk.
        features: F, of the trunk.

    Returns:
        The tensors, the names of those that were taken, and what `model` says of such a head.
    """
    found = [(name, match) for name in rest if (match := _HEAD.fullmatch(name))]
    head = _renumber({(match["layer"], match["kind"]): rest[name] for name, match in found})
    described = _describe(head)
    several = len({match["place"] for _, match in found}) != 1
    if several or not described or not _is_such_a_head(head, features, described):
        return {}, [], {}
    taken = [name for name, _ in found]
    if name := _find_prototypes(rest, embedding=described["embedding"]):
        return head | {"prototypes.weight": rest[name]}, [*taken, name], described
    return head, taken, described


def _renumber(found: Mapping[tuple[str | None, str], Tensor]) -> Tensors:
    """Name the layers as a `ProjectionHead` does; empty for another sequence of layers."""
    numbers = sorted({int(layer or 0) for layer, _ in found})
    normed = {int(layer or 0) for layer, kind in found if kind == "running_mean"}
    places = _PLACES.get(tuple(number in normed for number in numbers), ())
    place_of = dict(zip(numbers, places, strict=False))
    return {
        f"projection_head.{place_of[int(layer or 0)]}.{kind}": tensor
        for (layer, kind), tensor in found.items()
        if places
    }


def _describe(head: Tensors) -> dict[str, Any]:
    first, last = (head.get(f"projection_head.{place}.weight") for place in (0, 3))
    if first is None:
        return {}
    return {
        "head_hidden": 0 if last is None else first.shape[0],
        "head_batch_norm": "projection_head.1.weight" in head or last is None,
        "embedding": (first if last is None else last).shape[0],
    }


def _is_such_a_head(head: Tensors, features: int, described: Mapping[str, Any]) -> bool:
    with torch.device("meta"):
        built = ProjectionHead(
            features,
            described["head_hidden"],
            described["embedding"],
            batch_norm=described["head_batch_norm"],
        )
    own = {f"projection_head.{name}": tensor.shape for name, tensor in built.state_dict().items()}
    needed = [name for name in own if not name.endswith(COUNTER)]
    return all(name in head for name in needed) and all(head[name].shape == own.get(name) for name in head)


def _find_prototypes(rest: Mapping[str, Tensor], *, embedding: int) -> str:
    """Name the one set of prototypes that suits the head; of several sets none is the network's."""
    found = [name for name in rest if _PROTOTYPES.fullmatch(name)]
    fits = len(found) == 1 and found[0].endswith(".weight") and rest[found[0]].ndim == 2
    return found[0] if fits and rest[found[0]].shape[1] == embedding else ""
