"""A run on disk: its folder, checkpoints, reports and logs."""
