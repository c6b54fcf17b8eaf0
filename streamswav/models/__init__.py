"""Trunks, the projection head and the prototypes."""

from streamswav.models.layout import from_reference_layout, to_reference_layout
from streamswav.models.network import ProjectionHead, Prototypes, SwAVNetwork, build_network
from streamswav.models.shared_norm import share_statistics
from streamswav.models.trunk import ARCHITECTURES, Trunk, build_trunk, initialise_convolutions

__all__ = [
    "ARCHITECTURES",
    "ProjectionHead",
    "Prototypes",
    "SwAVNetwork",
    "Trunk",
    "build_network",
    "build_trunk",
    "from_reference_layout",
    "initialise_convolutions",
    "share_statistics",
    "to_reference_layout",
]
