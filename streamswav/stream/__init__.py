"""Samples from tar shards, exactly once, with positions that travel with the data."""
