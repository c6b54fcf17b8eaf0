"""`streamswav embed`: features of a stream of shards for other uses."""
