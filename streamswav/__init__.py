"""streamswav: SwAV pretraining on an endless stream of images, in one pass."""

__version__ = "0.1.0"
