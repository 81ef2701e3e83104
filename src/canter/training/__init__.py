"""Augmentation, the loop, training state."""
