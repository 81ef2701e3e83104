"""Training state in and out of a process: what a checkpoint holds is the same whether ranks share it or not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from canter.errors import CheckpointError
from canter.models.formats.fitting import fit_tensors
from canter.training.distributed.ranks import Ranks
from canter.training.run.checkpoints import Snapshot
from canter.training.step.optimizers import Average, Optimizers, copy_into


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
    try:
        optimizers.load_state_dict(_as_parameters(snapshot.optimizers, optimizers, source))
        if average is not None:
            average.load(snapshot.average or snapshot.weights)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source}: the training state beside it is damaged ({error!r})") from None


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
    parameters = {name: parameter for parameter, name in optimizers.names.items()}
    if any(isinstance(number, int) for state in states for number in state["state"]):
        states = _by_name(states, optimizers, source)

    def shared(value: Any, parameter: Tensor | None) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    return [
        state
        | {
            "state": {
                name: {key: shared(value, parameters.get(name)) for key, value in values.items()}
                for name, values in state["state"].items()
            }
        }
        for state in states
    ]


def _by_name(states: list[dict], optimizers: Optimizers, source: Any) -> list[dict]:
    """States of a checkpoint that had numbers for names, where they can only be those of what is trained now."""
    parameters = {name: parameter for parameter, name in optimizers.names.items()}
    found, numbered = [], optimizers.numbered()
    for state, (optimizer, _), names in zip(states, optimizers.parts, numbered):
        sizes = [[len(group["params"]) for group in of] for of in (state["param_groups"], optimizer.param_groups)]
        shapes = [
            value.shape == parameters[names[number]].shape
            for number, values in state["state"].items()
            if number < len(names)
            for value in values.values()
            if isinstance(value, Tensor) and value.ndim
        ]
        if len(states) != len(numbered) or sizes[0] != sizes[1] or not all(shapes):
            raise CheckpointError(
                f"{source}: the training state, of an older Canter, does not say which parameters it is of, and others "
                "are trained now; go on with --freeze and --optimizer.name as they were, and change them after the "
                "next checkpoint"
            )
        found.append(state | {"state": {names[n]: values for n, values in state["state"].items()}})
    return found
