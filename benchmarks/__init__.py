"""Measurements of time and memory. Run each from the repository's root, as in `python -m benchmarks.data`."""
