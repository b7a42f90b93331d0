"""Benchmarks, most of which write their measurements as JSON to `results/`."""
