"""The Vision Transformer as Flax modules."""
