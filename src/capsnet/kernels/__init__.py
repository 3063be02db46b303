"""Faster computations of the same results on a CPU: both convolutions (stem.py), votes and routing (cpu.py)."""
