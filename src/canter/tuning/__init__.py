"""Probe a training step, fit memory and time: a budget."""
