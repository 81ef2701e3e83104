"""Compute one optimiser step: gradients, optimisers, out-of-memory fallback."""
