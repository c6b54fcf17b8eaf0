"""Certifies streamswav on a GPU node; `ops/certify-gpu` starts it."""
