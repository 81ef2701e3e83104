"""Keep a run on disk: its folder, checkpoints, logs and trackers."""
