"""Weights in: files and runs of many makers, recognised by their tensors' names."""
