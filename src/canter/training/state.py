"""Training state in and out of a process: what a checkpoint holds is the same whether ranks share it or not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from canter.errors import CheckpointError
from canter.models.fitting import fit_tensors
from canter.training.checkpoints import Snapshot
from canter.training.optimizers import Optimizers
from canter.training.ranks import Ranks
from canter.training.weights import Average, copy_into


def take_snapshot(
    state: dict[str, Any], model: nn.Module, optimizers: Optimizers, average: Average | None, ranks: Ranks
) -> Snapshot | None:
    """A copy in the CPU's memory; None on ranks that do not write. Shards are gathered by all ranks together."""
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if not ranks.first and not sharded:
        return None
    weights = _whole(model.state_dict())
    parts = _whole(optimizers.state_dict())
    mean = None
    if average is not None:
        mean = weights | _whole(average.shadow)
    return Snapshot(state, weights, parts, mean) if ranks.first else None


def put_back(
    snapshot: Snapshot, model: nn.Module, optimizers: Optimizers, average: Average | None, source: Any
) -> None:
    """The reverse, on every rank. Raises CheckpointError where the snapshot is of other shapes."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        targets = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                copy_into(targets[name], tensor)
    else:
        fit_tensors(model, snapshot.weights, source)
    optimizers.load_state_dict(_as_parameters(snapshot.optimizers, optimizers, source))
    if average is not None:
        average.load(snapshot.average or snapshot.weights)


def _whole(value: Any) -> Any:
    """Copies of all tensors within, gathered where they are sharded."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _as_parameters(states: list[dict], optimizers: Optimizers, source: Any) -> list[dict]:
    """Optimiser states whose tensors are sharded as the parameters that they belong to."""
    if len(states) != len(optimizers.parts):
        raise CheckpointError(
            f"{source}: training state is of {len(states)} optimisers, not {len(optimizers.parts)}"
        )
    spread = []
    for state, (optimizer, _) in zip(states, optimizers.parts):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {}
        for number, values in state["state"].items():
            parameter = parameters[number]
            moments[number] = {
                name: distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements
                )
                if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim
                else value
                for name, value in values.items()
            }
        spread.append(state | {"state": moments})
    return spread
