"""Training: the recipe of a run, its loop, data, steps and files."""
