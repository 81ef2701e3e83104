"""Measure decoding speed beside other frameworks."""
