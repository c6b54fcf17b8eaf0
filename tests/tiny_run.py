"""A finished run in miniature: a real checkpoint of a tiny network, as the trainer lays it down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamswav.config import Config, StorageSection, dump_config, parse_config
from streamswav.models import SwAVNetwork, build_network
from streamswav.stream.store import Store, join
from streamswav.training.checkpoint import CheckpointFolder, pack
from streamswav.transfer.weights.names import to_reference

PROTOTYPES = 8


def tiny_config(**model: Any) -> Config:
    section = {"trunk": "resnet10", "width": 0.125, "stem": "small", "head_hidden": 16, "embedding": 8}
    crops = {"sizes": [16, 8], "counts": [2, 1], "scales": [[0.3, 1.0], [0.1, 0.3]]}
    return parse_config(
        {"stream": {"seed": 5}, "model": section | model, "crops": crops, "swav": {"prototypes": PROTOTYPES}}
    )


def as_published(network: SwAVNetwork) -> dict[str, Tensor]:
    """Return a network's tensors under the names of the published SwAV weights."""
    beside = {name: each for name, each in network.state_dict().items() if not name.startswith("trunk.")}
    return to_reference(network.trunk.state_dict(), beside)


def save_tiny_run(
    url: str,
    *,
    config: Config | None = None,
    storage: StorageSection | None = None,
    seed: int = 1,
    change: Callable[[dict[str, bytes]], object] = lambda files: None,
    change_state: Callable[[dict[str, Any]], object] = lambda state: None,
) -> tuple[SwAVNetwork, str]:
    """Save a checkpoint below `url`; return its network and the checkpoint's own folder."""
    config = config or tiny_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config.model, prototypes=PROTOTYPES)
    state = dict(network.state_dict())
    change_state(state)
    files = {
        "model.pt": pack({"network": state, "optimizer": {}}),
        "position.json": b"{}",
        "config.yaml": dump_config(config).encode(),
    }
    change(files)
    store = Store(storage) if storage else Store()
    folder = CheckpointFolder(join(url, "checkpoints"), store)
    return network.eval(), folder.save(files, step=12, images=3072, about={}).url
