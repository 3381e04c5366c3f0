"""`Conv1D` of `transformers` (GPT-2), a linear layer that stores its weight as [in, out].

It computes x W + b. `nn.Linear` with W' computes the same, so the networks that quantization works
on, and those that a file is loaded into, have that in its place. Recognized by its structure;
`transformers` is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from subbyte.core.ready import copied


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module has the name, the sizes nx and nf and the parameters of Conv1D, no more."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).__name__ != "Conv1D" or weight is None or bias is None:
        return False
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    alone = len(module._parameters) == 2 and not module._buffers and not module._modules
    return alone and tuple(weight.shape) == sizes and tuple(bias.shape) == sizes[1:]


def with_linears(model: nn.Module, names: Collection[str]) -> nn.Module:
    """The network with `nn.Linear` for each Conv1D of these names; itself, if there is none."""
    named = dict(model.named_modules(remove_duplicate=False))
    if not any(name in named and is_conv1d(named[name]) for name in names):
        return model
    twin = copied(model)
    held = dict(twin.named_modules(remove_duplicate=False))
    return linears_in_place(twin, {id(held[name]) for name in names if name in held})


def linears_in_place(model: nn.Module, chosen: Collection[int] | None = None) -> nn.Module:
    """In place, but for a network that is one itself: `nn.Linear` for every Conv1D.

    chosen: ids of the modules that are meant, None for all. A weight that several share stays one.
    """
    weights: dict[int, nn.Parameter] = {}
    twins: dict[int, nn.Module] = {
        id(module): _linear(module, weights)
        for module in list(model.modules())
        if is_conv1d(module) and (chosen is None or id(module) in chosen)
    }
    return _replaced(model, twins)


def conv1d_in_place(twin: nn.Module, given: nn.Module, quantized: Collection[str]) -> nn.Module:
    """In place: Conv1D again, as in the network that was given, where a layer stays float.

    A file is loaded into the network's own class, and float weights go there as they are stored.
    """
    held = dict(twin.named_modules(remove_duplicate=False))
    back: dict[int, nn.Module] = {
        id(held[name]): copied(module).cpu().float().eval()
        for name, module in given.named_modules()
        if is_conv1d(module) and name not in quantized
    }
    return _replaced(twin, back)


def _replaced(model: nn.Module, others: Mapping[int, nn.Module]) -> nn.Module:
    """In place: others of these modules, by id, wherever the network holds them."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in others:
                parent._modules[name] = others[id(child)]
    return others.get(id(model), model)


def _linear(module: nn.Module, weights: dict[int, nn.Parameter]) -> nn.Linear:
    """weights: id of a Conv1D's weight -> the transposed one."""
    own: Any = module
    n_in, n_out = own.weight.shape
    linear = nn.Linear(n_in, n_out, device="meta")
    transposed = nn.Parameter(own.weight.detach().t().contiguous(), own.weight.requires_grad)
    linear.weight = weights.setdefault(id(own.weight), transposed)
    linear.bias = own.bias
    return linear.train(module.training)
