"""Decode a batch of requests: caches, search, rules, quantisation."""
