"""What a trained trunk is worth, and how it leaves: measuring, finetuning, features, weights in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamswav.transfer.weights import load_trunk

__all__ = ["load_trunk"]


def __getattr__(name: str) -> Any:
    """Import `load_trunk` when it is asked for: loader processes come by here, and need no network."""
    if name != "load_trunk":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streamswav.transfer import weights  # noqa: PLC0415

    return weights.load_trunk
