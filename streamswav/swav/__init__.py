"""The objective: Sinkhorn codes, swapped prediction, the feature queue."""
