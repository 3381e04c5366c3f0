"""Which weights of a network can be quantized, and which module owns each.

A site is one weight. Its name is the layer's name; of layers that hold several weights, which are
bare parameters there, each has a name of its own (`attn.in_proj`, `lstm.weight_ih_l0`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from subbyte.errors import SubbyteError

CHANNEL_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    nn.Embedding: 0,
    nn.MultiheadAttention: 0,
    nn.LSTM: 0,
    nn.GRU: 0,
    nn.RNN: 0,
}
"""The supported layers, and the dimension of their weight that counts output channels.

A transposed convolution stores [in, out / groups, ...]: with groups, one scale serves the channels
of equal index in all groups.
"""

SHARING = ("Embedding", "Linear")
"""Layers that may share one packed weight: [entries, features] and [out, in] mean the same."""

_UNSUPPORTED = (nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, slots=True)
class Site:
    """One weight that can be quantized."""

    name: str  # "features.0", "attn.in_proj"
    type: str  # "Conv2d", "MultiheadAttention": the supported class, not a subclass of it
    owner: str  # path of the module that holds the parameter
    parameter: str  # its name there: "weight", "in_proj_weight"
    channel_axis: int
    shape: tuple[int, ...]

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """What a rule may call it: its own name, and the layer's that holds it with others."""
        return (self.name,) if self.owner in ("", self.name) else (self.name, self.owner)


def supported_type(module: nn.Module) -> type[nn.Module] | None:
    """The entry of CHANNEL_AXIS that the module is an instance of."""
    return next((kind for kind in CHANNEL_AXIS if isinstance(module, kind)), None)


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Every weight of the model that can be quantized, in the order of its modules."""
    return tuple(_sites(model))


def _sites(model: nn.Module) -> Iterator[Site]:
    refused = unsupported(model)
    for owner, module in model.named_modules():
        kind = supported_type(module)
        if kind is None or owner in refused:
            continue
        for parameter in weight_names(module):
            weight = stored_weight(module, parameter)
            name = _site_name(owner, parameter)
            if isinstance(weight, UninitializedParameter):
                raise SubbyteError(
                    f"layer '{name}' has no shape yet; run one batch through it first"
                )
            axis = CHANNEL_AXIS[kind]
            yield Site(name, kind.__name__, owner, parameter, axis, tuple(weight.shape))


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the quantizable parameters that a supported module has."""
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))
    if not isinstance(module, nn.MultiheadAttention):
        return ("weight",)
    return tuple(name for name in _PROJECTIONS if _holds(module, name))


def _holds(module: nn.Module, name: str) -> bool:
    """Whether a module has this parameter itself, prepared or not."""
    return module._parameters.get(name) is not None or is_parametrized(module, name)


def stored_weight(module: nn.Module, name: str) -> Tensor:
    """The parameter itself; of a prepared layer the float weight, without quantizing it."""
    if is_parametrized(module, name):
        chains: Mapping[str, Any] = module.parametrizations  # type: ignore[assignment]
        if chains[name].is_tensor:  # else a parametrization of several tensors, as weight norm
            return chains[name].original
    return getattr(module, name)


def bias_of(model: nn.Module, site: Site) -> Tensor | None:
    """The bias that goes with the weight, without its graph; attention's is not of one weight."""
    bias = getattr(model.get_submodule(site.owner), "bias", None)
    return None if bias is None or site.parameter != "weight" else bias.detach()


def unsupported(model: nn.Module) -> dict[str, tuple[str, str]]:
    """torch.nn layers that subbyte cannot quantize: path -> (class name, why not).

    Bare parameters of a network (a table of positions, say) are not layers and stay float.
    """
    found = {}
    for path, module in model.named_modules():
        reason = why_not(module)
        if reason:
            kind = _plain_class(module).__name__
            found[path] = (kind, reason)
            if isinstance(module, nn.MultiheadAttention):  # it reads this layer's weight itself
                inner = type(module.out_proj).__name__
                found[join(path, "out_proj")] = (inner, f"it is a part of {kind}: {reason}")
    return found


def why_not(module: nn.Module) -> str | None:
    """Why a layer cannot be quantized, in words; None for one that can and for what is no layer."""
    if isinstance(module, _UNSUPPORTED):
        return "there is no packed layer of this kind"
    kind = supported_type(module)
    if kind is None:
        return None
    if isinstance(module, LazyModuleMixin):  # `sites` asks for its shape
        return None
    if weight_names(module) == ("weight",) and not _holds(module, "weight"):
        return (
            "its weight is computed from other parameters (old weight norm, pruning); make it one "
            "again first: remove_weight_norm, prune.remove"
        )
    extra = _beyond(module, kind)
    if extra:
        return f"it {extra}, which packing would lose"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its max_norm rewrites the weights"
    return None


def _beyond(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a layer has that its torch.nn class has not, in words; None for nothing of account."""
    own = _plain_class(module)
    for name in (name for c in own.__mro__[: own.__mro__.index(kind)] for name in vars(c)):
        if name not in _HARMLESS:
            return f"{'overrides' if hasattr(kind, name) else 'adds'} {kind.__name__}.{name}"
    for name in ("forward", "_conv_forward", "__call__", "_call_impl"):
        if name in vars(module):
            return f"has a {name} of its own"
    prepared = is_parametrized(module)  # what it was given since then is for packing to refuse
    if isinstance(module, nn.MultiheadAttention) or prepared:
        return None
    known = {"weight", "bias", *getattr(module, "_flat_weights_names", ())}
    more = sorted({*module._parameters, *module._buffers} - known)
    more += list(module._modules)
    return f"has a {more[0]} of its own" if more else None


_HARMLESS = {  # in a subclass: they change neither what a layer computes nor what it holds
    "__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__constants__", "__repr__", "__firstlineno__",
    "__static_attributes__", "__parameters__", "__orig_bases__", "__dict__", "__weakref__",
    "__classdictcell__", "__abstractmethods__", "__jit_unused_properties__", "_abc_impl",
    "_version", "extra_repr", "reset_parameters", "_reset_parameters",
}  # fmt: skip


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before parametrize put a subclass of its own in front."""
    prepared = is_parametrized(module) and type(module).__name__.startswith("Parametrized")
    return type(module).__bases__[0] if prepared else type(module)


def owners_of_tied_weights(model: nn.Module) -> dict[str, list[str]]:
    """Parameters that several modules hold: each of their full names -> all of them."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # a module used twice appears once: that is no tie
        for name, parameter in own_parameters(module).items():
            names.setdefault(id(parameter), []).append(join(path, name))
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def sharing_sites(model: nn.Module) -> dict[str, tuple[Site, ...]]:
    """Weights that several layers use as they are, such as a table of embeddings and a head: the
    name of the first site -> the others. Only where all that hold the parameter are such layers."""
    tied = owners_of_tied_weights(model)
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites(model):
        owners = tied.get(join(site.owner, site.parameter))
        if owners is not None and site.type in SHARING:
            groups.setdefault(tuple(owners), []).append(site)
    return {
        own[0].name: tuple(own[1:]) for owners, own in groups.items() if len(own) == len(owners)
    }


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters, without its children's."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def join(path: str, name: str) -> str:
    """`path.name`, or `name` at the root."""
    return f"{path}.{name}" if path else name


def _site_name(owner: str, parameter: str) -> str:
    return owner if parameter == "weight" else join(owner, parameter.removesuffix("_weight"))
