"""Faster computations of the same results: convolutions (stem.py), votes and routing (fused.py, on cpu.py and gpu.py)."""
