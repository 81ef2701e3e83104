"""Data of a run: rows of manifests, micro-batches loaded ahead, the steps of the plan."""
