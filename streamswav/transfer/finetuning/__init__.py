"""Supervised training of a trunk and a head, from labelled shards."""
