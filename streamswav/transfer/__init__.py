"""What a trained trunk is worth, and how it leaves: measuring, finetuning, features, weights in and out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamswav.transfer.embedding.embeddings import read_embeddings
    from streamswav.transfer.weights.trunks import load_trunk

__all__ = ["load_trunk", "read_embeddings"]

_MODULES = {"load_trunk": "weights.trunks", "read_embeddings": "embedding.embeddings"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and then only: loader processes come by here, and need no network."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
