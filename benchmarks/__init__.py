"""Measurements, each written as JSON to `results/`."""
