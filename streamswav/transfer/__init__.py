"""What a trained trunk is worth: kNN, linear probes, weights in and out."""

from streamswav.transfer.weights import load_trunk

__all__ = ["load_trunk"]
