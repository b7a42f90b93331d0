"""What a model scores, and what its backbone makes of images."""
