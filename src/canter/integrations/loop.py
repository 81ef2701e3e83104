"""Batches of a plan for a training loop of one's own (examples/plain_loop.py, examples/lightning_module.py).

`MicroBatches` reads and tokenises the utterances of an index, `collate` pads examples to a batch, and `merge_pending`
merges the statistics of BatchNorm once a step, in the order of the plan.
"""

from canter.models.norm import merge_pending
from canter.training.feed.data import MicroBatches, collate

__all__ = ["MicroBatches", "collate", "merge_pending"]
