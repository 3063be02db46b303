"""Measurements that need a clone: beside public implementations, and of whole trainings. Not part of the package."""
