"""Faster ways to the same results: convolutions (stem.py), votes and routing (fused.py), and their C library."""
