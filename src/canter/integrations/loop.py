"""Tools for a plain PyTorch loop under a plan (examples/plain_loop.py, examples/lightning_module.py).

`MicroBatches` reads and tokenises the utterances of an index, `collate` pads examples into a batch, and `merge_pending`
merges the BatchNorm statistics once a step, in the order of the plan.
"""

from canter.models.norm import merge_pending
from canter.training.feed.data import MicroBatches, collate

__all__ = ["MicroBatches", "collate", "merge_pending"]
