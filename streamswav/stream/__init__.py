"""Samples from tar shards, exactly once, with positions that travel with the data.

open_stream(urls) -> Stream -> Sample, Sample, ...        WebDatasetSource: in front of webdataset's stages
"""

from streamswav.stream.open import Stream, open_stream
from streamswav.stream.position import Position
from streamswav.stream.samples import Sample
from streamswav.stream.webdataset import WebDatasetSource

__all__ = ["Position", "Sample", "Stream", "WebDatasetSource", "open_stream"]
