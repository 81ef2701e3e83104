"""The demo: a synthetic corpus, a run and its report."""
