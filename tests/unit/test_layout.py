from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamswav.config import ModelSection
from streamswav.models import (
    SwAVNetwork,
    build_network,
    build_trunk,
    from_reference_layout,
    to_reference_layout,
)

PUBLISHED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "goldens" / "reference_checkpoint_tensors.json").read_text()
)


def on_meta(width: float, head_hidden: int) -> SwAVNetwork:
    with torch.device("meta"):
        return build_network(ModelSection(width=width, head_hidden=head_hidden), prototypes=3000)


@pytest.mark.parametrize(("name", "width"), [("resnet50", 1), ("resnet50w2", 2), ("resnet50w4", 4)])
def test_names_and_shapes_are_those_of_the_published_weights(name: str, width: float) -> None:
    published = PUBLISHED[name]
    network = on_meta(width, published["head_hidden"])
    state = to_reference_layout(network.state_dict())
    assert {key: list(tensor.shape) for key, tensor in state.items()} == published["tensors"]
    assert sum(parameter.numel() for parameter in network.parameters()) == published["parameters"]


def test_the_trunk_of_w5_is_that_of_the_published_weights() -> None:
    with torch.device("meta"):
        trunk = build_trunk(ModelSection(width=5))
    state = to_reference_layout({f"trunk.{key}": tensor for key, tensor in trunk.state_dict().items()})
    assert {key: list(tensor.shape) for key, tensor in state.items()} == PUBLISHED["resnet50w5"]["tensors"]


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_published_weights_load_strictly(prefix: str) -> None:
    network = on_meta(1, 2048)
    state = to_reference_layout(network.state_dict())
    renamed = {prefix + key.removeprefix("module."): tensor for key, tensor in state.items()}
    assert list(from_reference_layout(renamed)) == list(network.state_dict())


def test_a_tensor_that_does_not_belong_is_not_dropped_silently() -> None:
    network = on_meta(1, 2048)
    state = to_reference_layout(network.state_dict()) | {"module.fc.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"trunk\.fc\.weight"):
        network.load_state_dict(from_reference_layout(state), assign=True)
