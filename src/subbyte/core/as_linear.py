"""Layers of `transformers` that are linear layers in another form.

The networks that quantization works on, and those that a file is loaded into, have `nn.Linear` in
their place: for `Conv1D` (GPT-2: x W + b, its weight stored as [in, out]) one, for a stack of
experts one for each slice (experts.py). Recognized by their structure; `transformers` need not be
installed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from subbyte.core.experts import Experts, is_experts
from subbyte.core.ready import copied


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module has the name, the sizes nx and nf and the parameters of Conv1D, no more."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).__name__ != "Conv1D" or weight is None or bias is None:
        return False
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    alone = len(module._parameters) == 2 and not module._buffers and not module._modules
    return alone and tuple(weight.shape) == sizes and tuple(bias.shape) == sizes[1:]


def in_other_form(module: nn.Module) -> bool:
    """Whether a layer is one of those that this file is about."""
    return is_conv1d(module) or is_experts(module)


def with_linears(model: nn.Module, names: Collection[str]) -> nn.Module:
    """The network with `nn.Linear` in the place of the layers that these names are of; itself, if
    there is none. Names of a stack's experts begin with its own."""
    named = dict(model.named_modules(remove_duplicate=False))
    meant = [path for path, module in named.items() if _meant(module, path, names)]
    if not meant:
        return model
    twin = copied(model)
    held = dict(twin.named_modules(remove_duplicate=False))
    return linears_in_place(twin, {id(held[path]) for path in meant})


def linears_in_place(model: nn.Module, chosen: Collection[int] | None = None) -> nn.Module:
    """In place, but for a network that is one itself: `nn.Linear` for every such layer.

    chosen: ids of the modules that are meant, None for all. A weight that several share stays one.
    """
    weights: dict[int, nn.Parameter] = {}
    twins: dict[int, nn.Module] = {
        id(module): _linear(module, weights) if is_conv1d(module) else Experts(module)
        for module in list(model.modules())
        if in_other_form(module) and (chosen is None or id(module) in chosen)
    }
    return _replaced(model, twins)


def given_form_in_place(twin: nn.Module, given: nn.Module, quantized: Collection[str]) -> nn.Module:
    """In place: such a layer again as in the network that was given, where all of it stays float.

    A file is loaded into the network's own class, and float weights go there as they are stored.
    """
    held = dict(twin.named_modules(remove_duplicate=False))
    back: dict[int, nn.Module] = {
        id(held[path]): copied(module).cpu().float().eval()
        for path, module in given.named_modules()
        if in_other_form(module) and not _meant(module, path, quantized)
    }
    return _replaced(twin, back)


def _meant(module: nn.Module, path: str, names: Collection[str]) -> bool:
    """Whether a layer in another form, or a part of it, is among the names."""
    if is_conv1d(module):
        return path in names
    inside = f"{path}." if path else ""
    return is_experts(module) and any(name.startswith(inside) for name in names)


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
