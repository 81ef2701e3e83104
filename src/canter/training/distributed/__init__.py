"""Distributed training: sharding."""
