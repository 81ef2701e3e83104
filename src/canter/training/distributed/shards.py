"""Training state sharded over ranks (FSDP2): each rank keeps its part of weights, gradients and optimiser state.

FSDP's ranks meet in every layer, and would wait forever for one that ran out of memory or has fewer micro-batches. So
weights are gathered once, before the step's first micro-batch; ranks then compute their micro-batches independently and
split them as needed; gradients are reduced and scattered once, at the end of the step. Optimiser state and the weights
between steps are sharded; a step itself needs memory for all weights and gradients.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from canter.models.batch import Batch
from canter.models.model import SpeechModel
from canter.models.norm import frozen_statistics
from canter.models.protocol import AnyModel
from canter.ranks import Ranks


class Shards:
    """A model sharded over all ranks, in place: its parameters become DTensors."""

    def __init__(self, model: AnyModel, device: torch.device, ranks: Ranks):
        """Shard a model that supports "shard"."""
        self.model = model = cast(SpeechModel, model)
        self.device, self.ranks = device, ranks
        mesh = init_device_mesh(device.type, (ranks.size,))
        for stack in (model.encoder, model.decoder):
            for layer in getattr(stack, "layers", ()):
                fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, "loss")
        self.modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.root = self.modules[0]
        self.root.set_reshard_after_backward(False)

    def gather(self) -> None:
        """Gather all weights on every rank, until ``scatter``; computations in between do not synchronise."""
        self.root.set_requires_gradient_sync(False)
        for module in self.modules:
            module.unshard()

    def scatter(self) -> None:
        """Reduce each rank to its part of the weights."""
        for module in self.modules:
            module.reshard()

    def sum_gradients(self, objective: Callable[[Batch], Tensor]) -> None:
        """Reduce and scatter gradients by the backward pass of a tiny batch of weight zero, then scatter weights."""
        self.root.set_requires_gradient_sync(True)
        with frozen_statistics():
            (objective(self._tiny()) * 0).backward()
        self.scatter()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.ranks.size)  # FSDP takes the mean

    def _tiny(self) -> Batch:
        """Return an utterance of a few frames."""
        samples = round(4 * self.model.frame_seconds * self.model.config.features.sample_rate)
        one = torch.ones(1, dtype=torch.long)
        audio = 0.1 * torch.sin(torch.arange(samples, dtype=torch.float32))[None]
        tokens = torch.zeros(1, 3, dtype=torch.long)
        return Batch(audio, one * samples, tokens, one * 3, one, tokens[:, :1] + 1, one, one * 0).to(self.device)
