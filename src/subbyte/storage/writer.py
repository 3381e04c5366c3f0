"""A packed model as one .safetensors with a JSON manifest; docs/format.md specifies the file."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from subbyte.core.grids import PerGroup
from subbyte.core.ready import unwrapped
from subbyte.core.sites import join
from subbyte.errors import SubbyteError
from subbyte.graph.activations import ActivationScales
from subbyte.graph.network import PROGRAM
from subbyte.graph.program import Program
from subbyte.graph.trace import Example, traced
from subbyte.models import Network, Preprocess
from subbyte.modules import SEVERAL, PackedWeight, is_fused
from subbyte.modules.absorb import Affine
from subbyte.packing import radix
from subbyte.storage.digests import digests_of, unsealed
from subbyte.storage.manifest import ADAPTER, FORMAT, VERSION, WORDS, ZSTD, fault_of
from subbyte.storage.tensorfile import write_safetensors


class ProgramWarning(UserWarning):
    """A file was saved without its network's program, and says why."""


def save(
    net: nn.Module,
    path: str | Path,
    *,
    compress: bool = False,
    distance: float | None = None,
    example: Example | None = None,
    activations: ActivationScales | None = None,
) -> int:
    """Write a packed model; returns the file's size in bytes.

    compress: zstd over base-N bytes instead of radix words, close to the entropy of the codes
    (a layer it does not shrink stays in words). distance: how far the float weights were from
    their levels when they were rounded, in steps, for `inspect`. example: inputs that forward
    takes, a tensor, a tuple or a dict of tensors; with it the file holds the network's program too,
    and opens without the network's class. activations: the scales of that program's values, from
    `calibrate_activations`. Where it cannot be traced a ProgramWarning says why, and
    the file is written without. The file appears whole or not at
    all: an older file of that name survives a full disk or a crash. Raises SubbyteError if the
    model has no packed layer, or if the file cannot be written.
    """
    net = unwrapped(net)
    packed = packed_layers(net)
    if not packed:
        raise SubbyteError("the model has no packed layer; save takes the result of pack()")
    program, constants = _program(net, example)
    if activations is not None:
        program = activations.on(program)
    if is_fused(net) and program is None:
        raise SubbyteError(
            "the model is fused; give save an input as example=, so that the file holds its program"
        )
    tensors, described = _layers(packed, compress)
    state, ties = _untied(net, {**_float_state(net, packed), **constants})
    affine = [name for name, module in net.named_modules() if isinstance(module, Affine)]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": _version(packed),
        "network": _network(net),
        **described,
        "state": list(state),
        **({"affine": affine} if affine else {}),
        **({"ties": ties} if ties else {}),
        **({} if distance is None else {"distance": distance}),
        **({} if program is None else {"program": program.to_dict()}),
    }
    preprocess = getattr(net, "preprocess", None)
    if program is not None and isinstance(preprocess, Preprocess):
        manifest["preprocess"] = asdict(preprocess)
    held = {**tensors, **state}
    manifest["sha256"] = digests_of(held, held)
    return write_safetensors(held, {FORMAT: _compact(manifest), **unsealed()}, Path(path))


def _layers(
    packed: Sequence[PackedLayer], compress: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the packed layers, and the manifest's keys that describe them."""
    grids = list(dict.fromkeys(layer.weight.grid for layer in packed))
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for layer in packed:
        own, encoding = _tensors(layer, compress)
        tensors |= {join(layer.name, name): value for name, value in own.items()}
        layers[layer.name] = {
            "type": layer.type,
            "shape": list(layer.weight.shape),
            "grid": grids.index(layer.weight.grid),
            "encoding": encoding,
            "bias": layer.bias is not None,
            **({"adapter": True} if ADAPTER[0] in own else {}),
        }
    shared = {alias: layer.name for layer in packed for alias in layer.others}
    described = {"grids": [grid.to_dict() for grid in grids], "layers": layers}
    return tensors, described | ({"shared": shared} if shared else {})


def _tensors(layer: PackedLayer, compress: bool) -> tuple[dict[str, Tensor], str]:
    """What the file holds of one packed layer, and the encoding of its codes."""
    codes, encoding = _encode(layer.weight, compress)
    own = {"codes": codes, "scale": layer.weight.scale}
    if layer.bias is not None:
        own["bias"] = layer.bias
    adapter = layer.weight.adapter()
    if adapter is not None:
        own |= zip(ADAPTER, (adapter.up, adapter.down, adapter.scale), strict=True)
    return own, encoding


def _untied(net: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state without second names of a tensor, and those names with the first."""
    ties = {alias: name for alias, name in tied_names(net).items() if {alias, name} <= set(state)}
    return {name: value for name, value in state.items() if name not in ties}, ties


def _version(packed: Sequence[PackedLayer]) -> int:
    """The oldest version whose readers understand the file."""
    grouped = any(isinstance(x.weight.grid.granularity, PerGroup) for x in packed)
    return VERSION if grouped or any(layer.others for layer in packed) else 1


def _program(net: nn.Module, example: Example | None) -> tuple[Program | None, dict[str, Tensor]]:
    """The program that goes into the file, and the tensors that it needs beside the state."""
    if example is None:
        held = net.meta.get(PROGRAM) if isinstance(net, fx.GraphModule) else None
        return held, {}
    try:
        return traced(net, example)
    except SubbyteError as error:
        warnings.warn(f"saved without a program: {error}", ProgramWarning, stacklevel=3)
        return None, {}


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer:
    """A packed weight in a model, with what its layer adds."""

    name: str
    type: str  # the torch.nn class that it stands for
    weight: PackedWeight
    bias: Tensor | None
    keys: frozenset[str]  # its entries in the model's state dict
    others: tuple[str, ...] = ()  # layers of their own that use the same weight


def packed_layers(net: nn.Module) -> list[PackedLayer]:
    """The packed layers of a model, in the order of its modules; one that stands twice once."""
    modules = dict(net.named_modules(remove_duplicate=False))
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        if isinstance(module, PackedWeight):
            paths.setdefault(id(module), []).append(path)
    return [_packed_layer(own, modules) for own in paths.values()]


def _packed_layer(paths: list[str], modules: Mapping[str, nn.Module]) -> PackedLayer:
    """paths: all names of one PackedWeight; the first is the layer's."""
    path, parents = paths[0], [path.rpartition(".")[0] for path in paths]
    weight, owner = modules[path], modules[parents[0]]
    assert isinstance(weight, PackedWeight)
    keys = {f"{p}.{name}" for p in paths for name in weight.state_dict()}
    type_name = type(owner).__name__.removeprefix("Packed")
    if type(owner) in SEVERAL.values():  # one of its weights; biases are the owner's
        return PackedLayer(path, type_name, weight, None, frozenset(keys))
    bias = getattr(owner, "bias", None)
    own = [parent for parent in parents if modules[parent] is owner]
    keys |= {join(parent, "bias") for parent in own} if bias is not None else set()
    others = tuple(p for p in parents if modules[p] is not owner)
    return PackedLayer(parents[0], type_name, weight, bias, frozenset(keys), others)


def _encode(weight: PackedWeight, compress: bool) -> tuple[Tensor, str]:
    """Codes as they go to disk, and the name of their encoding."""
    words = weight.words.cpu()
    if compress:
        levels = weight.grid.n_levels
        frame = radix.compress(weight.codes().cpu(), levels)
        size = radix.byte_count(weight.n_weights, levels)
        if frame.numel() < words.numel() and radix.may_grow(frame.numel(), size):
            return frame, ZSTD
    return words, WORDS


def _float_state(net: nn.Module, packed: list[PackedLayer]) -> dict[str, Tensor]:
    taken = frozenset().union(*(layer.keys for layer in packed))
    state = {name: value for name, value in net.state_dict().items() if name not in taken}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SubbyteError(
                f"state '{name}' is a {type(value).__name__}; only tensors are saved"
            )
    biases = {join(layer.name, "bias"): layer.bias for layer in packed if layer.bias is not None}
    fault = fault_of({**state, **biases})
    if fault:
        raise SubbyteError(f"{fault}; nothing was saved")
    return state


def tied_names(net: nn.Module) -> dict[str, str]:
    """Names of parameters and buffers that are one tensor: each later name -> the first."""
    first: dict[int, str] = {}
    parameters = net.named_parameters(remove_duplicate=False)
    named = itertools.chain(parameters, net.named_buffers(remove_duplicate=False))
    return {
        name: first[id(tensor)]
        for name, tensor in named
        if first.setdefault(id(tensor), name) != name
    }


def _network(net: nn.Module) -> dict[str, Any] | None:
    """Name and arguments of a zoo network; None for any other."""
    if not isinstance(net, Network):
        return None
    return {"name": net.spec.name, "arguments": dict(net.spec.arguments)}


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
