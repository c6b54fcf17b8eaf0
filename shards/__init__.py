"""Build, verify and describe tar shards."""
