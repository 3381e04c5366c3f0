"""What a packed file says of itself: the manifest, its entries, and the checks on both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from subbyte.core.functional import MIN_EXPONENT, n_groups, read_scale
from subbyte.core.grids import Grid, ScaleDomain
from subbyte.core.sites import join
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor, QuantizedWeight
from subbyte.errors import SubbyteError
from subbyte.graph.program import Program
from subbyte.packing import StoredTensor, radix

FORMAT, VERSION = "subbyte", 2
MAX_WEIGHTS = 2**40  # of one layer; a larger shape is damage
WORDS, ZSTD = "radix64", "radix-bytes+zstd"
ADAPTER = ("up", "down", "adapter_scale")
SCALE_DTYPES = {
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

    affine: names of BatchNorms that were absorbed. ties: names in the network that share a tensor
    of the state, each with the name that it is stored under. program: opens the file without the
    network's class; preprocess: how images become its input. distance: of the float weights to
    their levels when they were rounded, in steps; None if the method does not say. shared: layers
    that use the weight of another layer, each with that layer's name. digests: checksums of
    `names`, none in a file that was made before there were any. checked: whether the words of
    layers are looked at when the layers are read, else when they are first used.
    """

    network: dict[str, Any] | None
    entries: dict[str, LayerEntry]
    tensors: dict[str, Tensor]
    state_names: tuple[str, ...]
    n_bytes: int
    affine: tuple[str, ...] = ()
    distance: float | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    program: Program | None = None
    preprocess: dict[str, Any] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    checked: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the file, in the order of the manifest."""
        return tuple(_stated(self.entries, self.state_names))

    @property
    def opens_alone(self) -> bool:
        """Whether the file needs no network from outside."""
        return self.network is not None or self.program is not None

    def layers(self) -> dict[str, QuantizedLayer]:
        """The waist, read back. Raises SubbyteError naming the layer whose tensors are off."""
        return {name: self._layer(name, entry) for name, entry in self.entries.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that is not a layer's: norms, running statistics, float layers."""
        return {name: self.tensors[name] for name in self.state_names}

    def _layer(self, name: str, entry: LayerEntry) -> QuantizedLayer:
        try:
            weight = self._weight(name, entry)
            bias = self.tensors[join(name, "bias")] if entry.bias else None
            if bias is not None and not bias.is_floating_point():
                raise SubbyteError(f"the bias is {bias.dtype}, not a float type")
            return QuantizedLayer(weight, bias, self._adapter(name) if entry.adapter else None)
        except SubbyteError as error:
            raise SubbyteError(f"layer '{name}': {error}") from None

    def _weight(self, name: str, entry: LayerEntry) -> QuantizedWeight:
        stored, scale = (self.tensors[join(name, part)] for part in ("codes", "scale"))
        _check_scale(scale, entry)
        shape, grid = torch.Size(entry.shape), entry.grid
        if entry.encoding == WORDS:
            return StoredTensor(stored, scale, grid, shape, self.checked)
        if stored.dtype != torch.uint8 or stored.ndim != 1:
            raise SubbyteError(f"compressed codes are {stored.dtype} {list(stored.shape)}")
        codes = radix.decompress(stored, grid.n_levels, shape.numel()).reshape(shape)
        return QuantizedTensor(codes, read_scale(scale, grid.scale_domain), grid)

    def _adapter(self, name: str) -> LowRank:
        up, down, scale = (self.tensors[join(name, part)] for part in ADAPTER)
        return LowRank(up, down, scale)


def parse(
    metadata: Mapping[str, str], tensors: dict[str, Tensor], n_bytes: int, *, checked: bool = True
) -> Artifact:
    """What metadata and tensors say. Raises SubbyteError for what does not fit together."""
    manifest = _manifest(metadata)
    try:
        grids = [Grid.from_dict(value) for value in manifest["grids"]]
        entries = {name: _entry(v, grids) for name, v in manifest["layers"].items()}
        state = tuple(str(name) for name in manifest["state"])
        affine = tuple(str(name) for name in manifest.get("affine", ()))
        ties = {str(alias): str(name) for alias, name in manifest.get("ties", {}).items()}
        shared = {str(alias): str(name) for alias, name in manifest.get("shared", {}).items()}
        program = None if "program" not in manifest else Program.from_dict(manifest["program"])
        preprocess = manifest.get("preprocess")
        distance = manifest.get("distance")
        distance = None if distance is None else float(distance)
        network = manifest["network"]
        digests = tuple(str(value) for value in manifest.get("sha256", ()))
    except SubbyteError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SubbyteError(f"the manifest is malformed ({error!r})") from None
    _check_names(entries, state, tensors)
    _check_ties(ties, state)
    for alias, name in shared.items():
        if alias in entries or name not in entries:
            raise SubbyteError(
                f"the manifest shares layer '{name[:80]}' with '{alias[:80]}', which is not how "
                "its layers are"
            )
    fault = fault_of({name: tensors[name] for name in _float_names(entries, state)})
    if fault:
        raise SubbyteError(f"{fault}; the file is damaged, make or fetch it again")
    return Artifact(
        network, entries, tensors, state, n_bytes, affine, distance, ties, program, preprocess,
        shared, digests, checked,
    )  # fmt: skip


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
    whole = all(type(n) is int and 0 <= n <= MAX_WEIGHTS for n in shape)
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
    stated = _stated(entries, state)
    for name in stated:
        if name not in tensors:
            raise SubbyteError(f"tensor '{name}' is in the manifest but not in the file")
    extra = sorted(set(tensors) - set(stated))
    if extra or len(set(stated)) != len(stated):
        raise SubbyteError(f"the manifest does not account for every tensor once ({extra[:3]})")


def _stated(entries: Mapping[str, LayerEntry], state: tuple[str, ...]) -> list[str]:
    """Names of tensors: of each layer in turn, then the state."""
    own = [join(name, part) for name, entry in entries.items() for part in entry.parts]
    return [*own, *state]


def _check_ties(ties: Mapping[str, str], state: tuple[str, ...]) -> None:
    for alias, name in ties.items():
        if alias in state or name not in state:
            raise SubbyteError(
                f"the manifest ties '{alias[:80]}' to '{name[:80]}', which is not how its state is"
            )


def _float_names(entries: Mapping[str, LayerEntry], state: tuple[str, ...]) -> list[str]:
    """Tensors that are used as they are: the state and the biases."""
    return [*state, *(join(name, "bias") for name, entry in entries.items() if entry.bias)]


def fault_of(state: Mapping[str, Tensor]) -> str | None:
    """What no float tensor of a network may hold, in words: NaN, infinity, a negative variance."""
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        if not value.isfinite().all():
            return f"'{name[:200]}' has NaN or infinite values"
        if name.endswith("running_var") and (value < 0).any():
            return f"'{name[:200]}' is a variance and has negative values"
    return None


def _check_scale(scale: Tensor, entry: LayerEntry) -> None:
    wanted = SCALE_DTYPES[entry.grid.scale_domain]
    groups = n_groups(entry.shape, entry.grid)
    if scale.dtype != wanted or tuple(scale.shape) != (groups,):
        raise SubbyteError(
            f"scale is {scale.dtype} {list(scale.shape)}, the grid needs {wanted} [{groups}]"
        )
    if scale.dtype == torch.int8 and scale.numel() and int(scale.min()) < MIN_EXPONENT:
        raise SubbyteError(f"scale exponent {int(scale.min())} is below {MIN_EXPONENT}")
