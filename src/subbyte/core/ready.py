"""What must hold before any work starts, on either road; each fault is one line that names it.

Shared by `prepare` and `quantize` (and `pack`, which would lose what is refused here).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from subbyte.core.sites import Site, join, stored_weight
from subbyte.errors import SubbyteError

N = TypeVar("N", bound=nn.Module)


def copied(model: N, shared: Iterable[Tensor] = ()) -> N:
    """A deep copy, also of a network that holds results of its last pass, as old weight norm and
    prepared recurrent layers do.

    shared: tensors that the copy has in common with the network, as nobody writes to them.
    """
    results: dict[int, Tensor] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for held in vars(module).values()
        for value in (held if isinstance(held, list) else [held])
        if isinstance(value, Tensor) and not value.is_leaf
    }
    memo: dict[int, object] = {**results, **{id(tensor): tensor for tensor in shared}}
    return copy.deepcopy(model, memo)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner: Mapping[str, Any] = model._modules
        if isinstance(model, parallel):
            model = inner["module"]
        elif "_orig_mod" in inner and len(inner) == 1:  # torch.compile's; its class is private
            model = inner["_orig_mod"]
        else:
            return model


def make_plain(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """In place: these parametrized parameters become plain ones with these values.

    `parametrize.remove_parametrizations` would change the module's class, which a copy shares with
    its original.
    """
    chains: Any = module.parametrizations
    for name in values:
        del chains[name]
    kind, plain = type(module), type(module).__bases__[0]
    if len(chains):
        left = {
            k: v for k, v in vars(kind).items() if k not in (*values, "__dict__", "__weakref__")
        }
        module.__class__ = type(kind.__name__, (plain,), left)
    else:
        del module._modules["parametrizations"]
        module.__class__ = plain
    for name, value in values.items():
        own = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
        module.register_parameter(name, own)


def check_ready(model: nn.Module, chosen: Sequence[Site]) -> None:
    """Raises SubbyteError for values that are missing or not finite, or a layer that packing would
    rob of something.

    chosen: what will be quantized; the rest only has to have values.
    """
    for site in chosen:
        owner = model.get_submodule(site.owner)
        check_plain(site.name, owner)
        check_weight(stored_weight(owner, site.parameter), site.name)
    check_present(model)
    _check_numbers(model)


def check_plain(name: str, owner: nn.Module) -> None:
    """Packing replaces the module, so it must not carry what the packed one has no place for."""
    hooks = len(owner._forward_hooks) + len(owner._forward_pre_hooks) + len(owner._backward_hooks)
    hooks += len(owner._backward_pre_hooks)
    if hooks:
        raise SubbyteError(
            f"layer '{name}' has {hooks} hooks, which packing would drop; remove them"
        )
    if owner._buffers:
        raise SubbyteError(
            f"layer '{name}' has buffers of its own ({', '.join(owner._buffers)}), which packing "
            "would drop; keep it float"
        )


def check_weight(weight: Tensor, name: str) -> None:
    """Raises SubbyteError for a weight without values, or with some that are not finite."""
    if weight.is_meta:
        raise SubbyteError(f"weight of '{name}' is on the meta device; load its values first")
    if weight.numel() == 0:
        raise SubbyteError(
            f"weight of '{name}' is empty, shape {tuple(weight.shape)}; keep it float"
        )
    if not weight.isfinite().all():
        n_bad = int((~weight.isfinite()).sum())
        raise SubbyteError(
            f"weight of '{name}' has {n_bad} NaN or infinite values; "
            "go back to an earlier checkpoint or lower the learning rate"
        )


def check_present(model: nn.Module) -> None:
    """Raises SubbyteError for a parameter or buffer that has a shape and no values."""
    for name, value in _values(model):
        if value.is_meta:
            raise SubbyteError(f"'{name}' is on the meta device; load its values first")


def _check_numbers(model: nn.Module) -> None:
    """Of every parameter and buffer: infinity may be meant, as in masks; NaN never is."""
    for name, value in _values(model):
        if value.is_floating_point() and value.isnan().any():
            raise SubbyteError(
                f"'{name}' has NaN values; load other weights, or go back to an earlier checkpoint"
            )


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and not is_lazy(value):
                yield join(path, name), value
