"""The loop and what it needs: ranks, optimizer, schedule, checkpoints."""
