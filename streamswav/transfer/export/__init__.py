"""Weights out: files for other libraries, each with a card."""
