"""Trunks, the projection head and the prototypes."""
