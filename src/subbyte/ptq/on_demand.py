"""A float network without memory, whose parts have their weights while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from subbyte.core.sites import own_parameters
from subbyte.storage.shards import Shards


class OnDemand:
    """model: its parameters are on the meta device; its buffers get their values here."""

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self.model, self.shards = model, shards
        self.used: list[str] = []  # modules that have been given their parameters in a pass
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        kept = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in kept and name in shards:
                buffer.copy_(shards.read(name))

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The values of one of the model's parameters, from the files."""
        names = self._names[id(parameter)]
        return self.shards.read(next(name for name in names if name in self.shards))

    @contextmanager
    def filled(self, path: str, recurse: bool = True) -> Iterator[nn.Module]:
        """A module of the network that has its weights while this is open; recurse: its parts
        too."""
        module = self.model.get_submodule(path)
        empty = self._fill(module.modules() if recurse else [module])
        try:
            yield module
        finally:
            _put(empty)

    @contextmanager
    def on_demand(self, without: Iterable[str] = ()) -> Iterator[None]:
        """While it is open, the network runs: each module has its own parameters during its call.

        without: modules that are not run, nor anything inside them.
        """
        held: dict[str, list[_Place]] = {}
        handles: list[Any] = []
        skipped = tuple(f"{path}." for path in without)

        def before(path: str, module: nn.Module) -> None:
            if path not in held:  # else it still is in a pass that ended early
                self.used.append(path)
                held[path] = self._fill([module])

        for path, module in self.model.named_modules():
            if own_parameters(module) and not f"{path}.".startswith(skipped):
                handles += [
                    module.register_forward_pre_hook(lambda m, _, path=path: before(path, m)),
                    module.register_forward_hook(lambda *_, path=path: _put(held.pop(path))),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for places in held.values():  # of a pass that ended early
                _put(places)

    def _fill(self, modules: Iterable[nn.Module]) -> list[_Place]:
        """Weights in place; the parameters without memory that were there."""
        places = [
            (module, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        made: dict[int, nn.Parameter] = {}
        for module, name, parameter in places:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(self.value(parameter), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        return places


_Place = tuple[nn.Module, str, nn.Parameter]


def _put(places: Iterable[_Place]) -> None:
    for module, name, parameter in places:
        module._parameters[name] = parameter


def put_value(model: nn.Module, name: str, value: Tensor) -> None:
    """In place: a parameter or buffer of a network gets another tensor."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        own_value = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
        module._parameters[own] = own_value
    else:
        module._buffers[own] = value
