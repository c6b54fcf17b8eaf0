"""Subsets of labelled shards: listed keys, or n a class, written as small shards."""
