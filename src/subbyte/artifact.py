"""The packed file: one .safetensors with a JSON manifest. docs/format.md is its specification.

`save` writes a packed model, `load` gives the same packed model back, bit for bit. Nothing is
pickled and nothing is inferred from names or shapes: the manifest says what each tensor is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from subbyte.batchnorm import Affine, restore
from subbyte.errors import SubbyteError
from subbyte.files import write_atomically
from subbyte.functional import MIN_EXPONENT, n_groups, read_scale
from subbyte.grids import Grid, ScaleDomain
from subbyte.kernels import Precision
from subbyte.layers import join, sites
from subbyte.models import Network, build
from subbyte.modules import PackedMultiheadAttention, PackedWeight, is_fused, pack
from subbyte.packing import radix
from subbyte.tensors import LowRank, QuantizedLayer, QuantizedTensor

FORMAT, VERSION = "subbyte", 1
MAX_WEIGHTS = 2**40  # of one layer; a larger shape is damage
WORDS, ZSTD = "radix64", "radix-bytes+zstd"
ADAPTER = ("up", "down", "adapter_scale")
_SCALE_DTYPES = {
    ScaleDomain.FLOAT32: torch.float32,
    ScaleDomain.FLOAT16: torch.float16,
    ScaleDomain.POWER_OF_TWO: torch.int8,
}


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """What the manifest says of one layer."""

    type: str
    shape: tuple[int, ...]
    grid: Grid
    encoding: str
    bias: bool
    adapter: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The layer's tensors, by the last part of their names."""
        bias = ("bias",) if self.bias else ()
        return ("codes", "scale", *bias, *(ADAPTER if self.adapter else ()))


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A file as it was read: the manifest's content, and tensors as they are stored.

    affine: names of BatchNorms that were absorbed. distance: of the float weights to their levels
    when they were rounded, in steps; None if the method does not say.
    """

    network: dict[str, Any] | None
    entries: dict[str, LayerEntry]
    tensors: dict[str, Tensor]
    state_names: tuple[str, ...]
    n_bytes: int
    affine: tuple[str, ...] = ()
    distance: float | None = None

    def layers(self) -> dict[str, QuantizedLayer]:
        """The waist, read back. Raises SubbyteError naming the layer whose tensors are off."""
        return {name: self._layer(name, entry) for name, entry in self.entries.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that is not a layer's: norms, running statistics, float layers."""
        return {name: self.tensors[name] for name in self.state_names}

    def _layer(self, name: str, entry: LayerEntry) -> QuantizedLayer:
        try:
            codes = _read_codes(self.tensors[join(name, "codes")], entry)
            scale = self.tensors[join(name, "scale")]
            _check_scale(scale, entry)
            scale = read_scale(scale, entry.grid.scale_domain)
            weight = QuantizedTensor(codes.reshape(entry.shape), scale, entry.grid)
            bias = self.tensors[join(name, "bias")] if entry.bias else None
            if bias is not None and not bias.is_floating_point():
                raise SubbyteError(f"the bias is {bias.dtype}, not a float type")
            return QuantizedLayer(weight, bias, self._adapter(name) if entry.adapter else None)
        except SubbyteError as error:
            raise SubbyteError(f"layer '{name}': {error}") from None

    def _adapter(self, name: str) -> LowRank:
        up, down, scale = (self.tensors[join(name, part)] for part in ADAPTER)
        return LowRank(up, down, scale)


# ---------------------------------------------------------------- save


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
        scale = _stored_scale(layer.name, layer.weight)
        tensors |= {join(layer.name, "codes"): codes, join(layer.name, "scale"): scale}
        if layer.bias is not None:
            tensors[join(layer.name, "bias")] = layer.bias
        adapter = _adapter(layer)
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
    keys = {f"{path}.{name}" for name, _ in weight.named_buffers()}
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


def _stored_scale(name: str, weight: PackedWeight) -> Tensor:
    """The scale as its grid stores it; a model that was cast may hold it in another dtype."""
    stored = weight.scale.to(_SCALE_DTYPES[weight.grid.scale_domain])
    if not torch.equal(stored.to(weight.scale.dtype), weight.scale):
        raise SubbyteError(
            f"scale of '{name}' is {weight.scale.dtype} and does not fit the {stored.dtype} of its "
            "grid; save the model before converting it to another dtype"
        )
    return stored


def _adapter(layer: PackedLayer) -> LowRank | None:
    try:
        return layer.weight.adapter()
    except SubbyteError as error:
        raise SubbyteError(
            f"adapter of '{layer.name}': {error}; save the model before converting it to another "
            "dtype"
        ) from None


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


# ---------------------------------------------------------------- load


def load(
    path: str | Path, model: nn.Module | None = None, *, precision: Precision = "int8"
) -> nn.Module:
    """The packed model in a file, in eval mode, on the CPU.

    A zoo network rebuilds itself from the manifest; for any other pass `model`, the float network
    (its weights do not matter; it stays as it is). precision: of products, see `pack`. Raises
    SubbyteError for a file that is missing, damaged, of a newer version, or of another network.
    """
    artifact = read(path)
    try:
        return assemble(artifact, model, precision=precision)
    except SubbyteError as error:
        raise SubbyteError(f"{path}: {error}") from None


def assemble(
    artifact: Artifact, model: nn.Module | None = None, *, precision: Precision = "int8"
) -> nn.Module:
    """The packed model of what was read from a file; as `load`, whose errors name the file too."""
    net = pack(_skeleton(artifact, model), artifact.layers(), precision=precision)
    restore(net, artifact.affine)
    _load_state(net, artifact)
    return net


def read(path: str | Path) -> Artifact:
    """The file's manifest and tensors, checked. Raises SubbyteError naming file and fault."""
    path = Path(path)
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise SubbyteError(f"{path}: {what}; give the path of a packed .safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SubbyteError(
            f"{path}: not a whole safetensors file ({error}); it is damaged or was cut off: "
            "make or fetch it again"
        ) from None
    try:
        return _parse(metadata, tensors, path.stat().st_size)
    except SubbyteError as error:
        raise SubbyteError(f"{path}: {error}") from None


def _parse(metadata: Mapping[str, str], tensors: dict[str, Tensor], n_bytes: int) -> Artifact:
    manifest = _manifest(metadata)
    try:
        grids = [Grid.from_dict(value) for value in manifest["grids"]]
        entries = {name: _entry(v, grids) for name, v in manifest["layers"].items()}
        state = tuple(str(name) for name in manifest["state"])
        affine = tuple(str(name) for name in manifest.get("affine", ()))
        distance = manifest.get("distance")
        distance = None if distance is None else float(distance)
        network = manifest["network"]
    except SubbyteError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise SubbyteError(f"the manifest is malformed ({error!r})") from None
    _check_names(entries, state, tensors)
    return Artifact(network, entries, tensors, state, n_bytes, affine, distance)


def _manifest(metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise SubbyteError(
            "a safetensors file without a subbyte manifest; for float weights of a zoo network "
            "use `subbyte evaluate NETWORK --weights FILE`"
        )
    try:
        manifest = json.loads(metadata[FORMAT])
        version = manifest["version"]
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SubbyteError(f"the manifest is malformed ({error!r})") from None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SubbyteError(f"the manifest has version {version!r}, not a whole number from 1 up")
    if version > VERSION:
        raise SubbyteError(
            f"format version {version}, this subbyte reads up to {VERSION}; upgrade subbyte"
        )
    return manifest


def _entry(value: Mapping[str, Any], grids: list[Grid]) -> LayerEntry:
    shape = tuple(value["shape"])
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    if not whole or math.prod(shape) > MAX_WEIGHTS:
        raise SubbyteError(f"the manifest has a shape {str(value['shape'])[:80]}")
    if value["encoding"] not in (WORDS, ZSTD):
        raise SubbyteError(f"encoding {value['encoding']!r} is unknown; upgrade subbyte")
    if not isinstance(value["bias"], bool):
        raise SubbyteError(f"the manifest has bias {value['bias']!r}, neither true nor false")
    index = value["grid"]
    if not isinstance(index, int) or not 0 <= index < len(grids):
        raise SubbyteError(f"the manifest names grid {index!r}, it has {len(grids)}")
    adapter = value.get("adapter", False)
    if not isinstance(adapter, bool):
        raise SubbyteError(f"the manifest has adapter {adapter!r}, neither true nor false")
    return LayerEntry(
        str(value["type"]), shape, grids[index], value["encoding"], value["bias"], adapter
    )


def _check_names(
    entries: Mapping[str, LayerEntry], state: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> None:
    """The manifest accounts for every tensor, once."""
    stated = list(state)
    for name, entry in entries.items():
        stated += [join(name, part) for part in entry.parts]
    for name in stated:
        if name not in tensors:
            raise SubbyteError(f"tensor '{name}' is in the manifest but not in the file")
    extra = sorted(set(tensors) - set(stated))
    if extra or len(set(stated)) != len(stated):
        raise SubbyteError(f"the manifest does not account for every tensor once ({extra[:3]})")


def _read_codes(stored: Tensor, entry: LayerEntry) -> Tensor:
    count, n_levels = torch.Size(entry.shape).numel(), entry.grid.n_levels
    if entry.encoding == ZSTD:
        if stored.dtype != torch.uint8 or stored.ndim != 1:
            raise SubbyteError(f"compressed codes are {stored.dtype} {list(stored.shape)}")
        return radix.decompress(stored, n_levels, count)
    fault = radix.check_words(stored, n_levels, count)
    if fault:
        raise SubbyteError(fault)
    return radix.unpack(stored, n_levels, count)


def _check_scale(scale: Tensor, entry: LayerEntry) -> None:
    wanted = _SCALE_DTYPES[entry.grid.scale_domain]
    groups = n_groups(entry.shape, entry.grid)
    if scale.dtype != wanted or tuple(scale.shape) != (groups,):
        raise SubbyteError(
            f"scale is {scale.dtype} {list(scale.shape)}, the grid needs {wanted} [{groups}]"
        )
    if scale.dtype == torch.int8 and scale.numel() and int(scale.min()) < MIN_EXPONENT:
        raise SubbyteError(f"scale exponent {int(scale.min())} is below {MIN_EXPONENT}")


def _skeleton(artifact: Artifact, model: nn.Module | None) -> nn.Module:
    """The float network that the file is of: the one given, or the zoo's, checked to fit."""
    if model is not None:
        _check_entries(artifact.entries, model)
        return model
    if artifact.network is None:
        raise SubbyteError("the file holds no zoo network; pass yours: load(path, model=net)")
    try:
        name, arguments = artifact.network["name"], dict(artifact.network["arguments"])
        with torch.device("meta"):  # no memory before it is known to be the file's network
            _check_entries(artifact.entries, build(name, **arguments))
        return build(name, **arguments)
    except SubbyteError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise SubbyteError(f"the manifest's network is malformed ({str(error)[:200]!r})") from None


def _check_entries(entries: Mapping[str, LayerEntry], model: nn.Module) -> None:
    """The file is of this network, before anything is decoded."""
    known = {site.name: site for site in sites(model)}
    for name, entry in entries.items():
        if name not in known:
            raise SubbyteError(f"the network has no layer '{name}'; it has {', '.join(known)}")
        site = known[name]
        if (entry.type, entry.shape) != (site.type, site.shape):
            raise SubbyteError(
                f"layer '{name}' is {entry.type} {entry.shape} in the file, {site.type} "
                f"{site.shape} in the network"
            )


def _load_state(net: nn.Module, artifact: Artifact) -> None:
    """Fill everything but the packed layers; names and shapes must agree exactly."""
    own = net.state_dict()
    for name, value in artifact.state().items():
        if name not in own:
            raise SubbyteError(f"the network has no '{name}'; the file is of another network")
        if own[name].shape != value.shape:
            raise SubbyteError(
                f"'{name}' has shape {tuple(value.shape)} in the file, {tuple(own[name].shape)} "
                "in the network"
            )
        if own[name].is_floating_point() != value.is_floating_point():
            raise SubbyteError(
                f"'{name}' is {value.dtype} in the file, {own[name].dtype} in the network"
            )
    taken = frozenset().union(*(layer.keys for layer in packed_layers(net)))
    left = sorted(set(own) - set(artifact.state_names) - taken)
    if left:
        raise SubbyteError(f"the file has no '{left[0]}', which the network needs")
    net.load_state_dict(artifact.state(), strict=False, assign=True)  # dtypes are the file's
