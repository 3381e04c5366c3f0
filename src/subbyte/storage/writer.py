"""A packed model as one .safetensors with a JSON manifest; docs/format.md specifies the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from subbyte.core.atomic import write_atomically
from subbyte.core.sites import join
from subbyte.errors import SubbyteError
from subbyte.models import Network
from subbyte.modules import PackedMultiheadAttention, PackedWeight, is_fused
from subbyte.modules.absorb import Affine
from subbyte.packing import radix
from subbyte.storage.manifest import ADAPTER, FORMAT, VERSION, WORDS, ZSTD


def save(
    net: nn.Module,
    path: str | Path,
    *,
    compress: bool = False,
    distance: float | None = None,
) -> int:
    """Write a packed model; returns the file's size in bytes.

    compress: zstd over base-N bytes instead of radix words, close to the entropy of the codes
    (a layer it does not shrink stays in words). distance: how far the float weights were from
    their levels when they were rounded, in steps, for `inspect`. The file appears whole or not at
    all: an older file of that name survives a full disk or a crash. Raises SubbyteError if the
    model has no packed layer, or if the file cannot be written.
    """
    packed = packed_layers(net)
    if not packed:
        raise SubbyteError("the model has no packed layer; save takes the result of pack()")
    if is_fused(net):
        raise SubbyteError("the model is fused; save the packed model that fuse was given")
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    grids = list(dict.fromkeys(layer.weight.grid for layer in packed))
    for layer in packed:
        codes, encoding = _encode(layer.weight, compress)
        scale = layer.weight.scale
        tensors |= {join(layer.name, "codes"): codes, join(layer.name, "scale"): scale}
        if layer.bias is not None:
            tensors[join(layer.name, "bias")] = layer.bias
        adapter = layer.weight.adapter()
        if adapter is not None:
            parts = (adapter.up, adapter.down, adapter.scale)
            tensors |= {join(layer.name, n): t for n, t in zip(ADAPTER, parts, strict=True)}
        layers[layer.name] = {
            "type": layer.type,
            "shape": list(layer.weight.shape),
            "grid": grids.index(layer.weight.grid),
            "encoding": encoding,
            "bias": layer.bias is not None,
            **({} if adapter is None else {"adapter": True}),
        }
    state = _float_state(net, packed)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "network": _network(net),
        "grids": [grid.to_dict() for grid in grids],
        "layers": layers,
        "state": list(state),
    }
    affine = [name for name, module in net.named_modules() if isinstance(module, Affine)]
    manifest |= {"affine": affine} if affine else {}
    manifest |= {} if distance is None else {"distance": distance}
    return write_safetensors({**tensors, **state}, {FORMAT: _compact(manifest)}, Path(path))


def write_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> int:
    """Write whole or not at all (temporary file, fsync, rename); returns the size in bytes."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = to_bytes(plain, metadata)
    write_atomically(path, data)
    return len(data)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer:
    """A packed weight in a model, with what its layer adds."""

    name: str
    type: str  # the torch.nn class that it stands for
    weight: PackedWeight
    bias: Tensor | None
    keys: frozenset[str]  # its entries in the model's state dict


def packed_layers(net: nn.Module) -> list[PackedLayer]:
    """The packed layers of a model, in the order of its modules."""
    modules = dict(net.named_modules())
    return [
        _packed_layer(path, modules) for path, m in modules.items() if isinstance(m, PackedWeight)
    ]


def _packed_layer(path: str, modules: Mapping[str, nn.Module]) -> PackedLayer:
    weight, parent = modules[path], path.rpartition(".")[0]
    owner = modules[parent]
    assert isinstance(weight, PackedWeight)
    keys = {f"{path}.{name}" for name in weight.state_dict()}
    if isinstance(owner, PackedMultiheadAttention):  # a projection; the bias is the attention's
        return PackedLayer(path, "MultiheadAttention", weight, None, frozenset(keys))
    bias = getattr(owner, "bias", None)
    keys |= {join(parent, "bias")} if bias is not None else set()
    type_name = type(owner).__name__.removeprefix("Packed")
    return PackedLayer(parent, type_name, weight, bias, frozenset(keys))


def _encode(weight: PackedWeight, compress: bool) -> tuple[Tensor, str]:
    """Codes as they go to disk, and the name of their encoding."""
    words = weight.words.cpu()
    if compress:
        frame = radix.compress(weight.codes().cpu(), weight.grid.n_levels)
        if frame.numel() < words.numel():
            return frame, ZSTD
    return words, WORDS


def _float_state(net: nn.Module, packed: list[PackedLayer]) -> dict[str, Tensor]:
    taken = frozenset().union(*(layer.keys for layer in packed))
    state = {name: value for name, value in net.state_dict().items() if name not in taken}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise SubbyteError(f"'{name}' has NaN or infinite values; nothing was saved")
        if not isinstance(value, Tensor):
            raise SubbyteError(
                f"state '{name}' is a {type(value).__name__}; only tensors are saved"
            )
    return state


def _network(net: nn.Module) -> dict[str, Any] | None:
    """Name and arguments of a zoo network; None for any other."""
    if not isinstance(net, Network):
        return None
    return {"name": net.spec.name, "arguments": dict(net.spec.arguments)}


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
