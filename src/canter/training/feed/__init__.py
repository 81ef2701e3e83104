"""Deliver the micro-batches of the plan: loading ahead, speed perturbation, damaged data."""
