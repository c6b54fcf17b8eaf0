"""The loop and what it needs: ranks, optimizer, schedule, checkpoints; a loader for other loops."""

from streamswav.training.optim import LARS
from streamswav.training.stream_loader import StreamLoader

__all__ = ["LARS", "StreamLoader"]
