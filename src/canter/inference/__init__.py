"""Caches, the decoding engine, transcript writers."""
