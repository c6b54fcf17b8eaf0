"""Samples from tar shards, exactly once, with positions that travel with the data."""

from streamswav.stream.open import Stream, open_stream
from streamswav.stream.position import Position
from streamswav.stream.samples import Sample

__all__ = ["Position", "Sample", "Stream", "open_stream"]
