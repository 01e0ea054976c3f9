"""Timings and memory figures. Run each from the repository's root: `python -m benchmarks.data`."""
