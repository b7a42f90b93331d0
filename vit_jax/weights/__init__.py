"""Weights in the formats of other code bases."""
