"""Trunks, the projection head and the prototypes."""

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
    "initialise_convolutions",
    "share_statistics",
]
