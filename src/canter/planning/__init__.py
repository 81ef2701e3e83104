"""Who goes together, at which step, on which rank. NumPy only: usable without torch, with any framework."""
