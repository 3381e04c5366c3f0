"""How the processes of a group train one network: each a copy (DDP), or each a shard (FSDP2).

The weights that the optimizer updates stay float32 either way; `train.precision` is autocast's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from subbyte.core.group import Group, is_sharded
from subbyte.core.sites import sites, supported_type
from subbyte.tasks.batches import mapped

Forward = Callable[[Tensor], Tensor]


def copied_to_all(model: nn.Module, group: Group) -> Forward:
    """The network as DDP calls it: a pass back averages the gradients over the processes."""
    if group.alone:
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False)


def shard(model: nn.Module, group: Group) -> None:
    """In place, by FSDP2: parameters become shards, which are whole while their block runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(group.device).type, (group.size,))
    for path in _blocks(model):
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _blocks(model: nn.Module) -> list[str]:
    """The smallest module around each layer that is called, but for the network; inner ones first.

    Layers themselves stay of their own class, by which they are known.
    """
    found = {_around(model, site.owner) for site in sites(model)} - {""}
    return sorted(found, key=lambda path: (-path.count("."), path))


def _around(model: nn.Module, path: str) -> str:
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        is_called = type(module).forward is not nn.Module.forward
        if is_called and supported_type(module) is None:
            return path
    return path


@torch.no_grad()
def gathered(value: Any) -> Any:
    """The same structure with whole tensors, on the CPU, in place of shards; by all processes."""
    return mapped(lambda x: x.full_tensor().cpu() if is_sharded(x) else x, value)


def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """In place: whole tensors into a network, sharded or not."""
    now = model.state_dict()
    model.load_state_dict({name: _like(now.get(name), x) for name, x in state.items()})


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """In place: the state of an optimizer of whole parameters into one that may have shards."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, x in values.items():
            if isinstance(x, Tensor) and x.ndim and x.shape != own[i].shape:
                raise ValueError(f"the optimizer's '{name}' has shape {tuple(x.shape)}")
    parts = {
        i: {name: _like(own[i], x) for name, x in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _like(now: Any, x: Any) -> Any:
    """x in shards as `now` is, if that is one of the same shape."""
    if not is_sharded(now) or not isinstance(x, Tensor) or x.shape != now.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    whole = x.to(now.device)
    return distribute_tensor(whole, now.device_mesh, now.placements, src_data_rank=None)
