"""Faster computations of the same results: convolutions (stem.py), votes and routing (fused.py, cpu.py, gpu.py)."""
