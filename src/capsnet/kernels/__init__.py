"""Fused votes and routing: the same results as `layers.votes` and `routing.py`, with less memory traffic."""
