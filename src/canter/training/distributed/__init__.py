"""Distributed training: collectives, failure detection, sharding."""
