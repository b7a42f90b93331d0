"""What trained weights are used for: predictions, exports, a demo, and what a model costs."""
