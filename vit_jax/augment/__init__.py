"""What the device does to a batch of training images."""
