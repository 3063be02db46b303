"""Faster ways to the same results: convolutions (stem.py), routing (fused.py), and which of them when (select.py)."""
