"""Train on several ranks: collectives, failure detection, sharding."""
