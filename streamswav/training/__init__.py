"""The loop and what it needs: ranks, optimizer, schedule, checkpoints."""

from streamswav.training.optim import LARS

__all__ = ["LARS"]
