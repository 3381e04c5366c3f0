"""What a packed file weighs: bits, bytes, entropy and scales, per layer and in total."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subbyte import kernels
from subbyte.core.functional import entropy, level_shares
from subbyte.core.grids import Grid
from subbyte.core.sites import join
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError, of_file
from subbyte.kernels.panels import panel_of
from subbyte.modules import PackedConv2d, PackedLinear, PackedMultiheadAttention, PackedWeight
from subbyte.packing import radix
from subbyte.report.fold import Fold, folds
from subbyte.storage import Artifact, LayerEntry, assemble, packed_layers, read
from subbyte.train.watch import far_from_levels

_NAMED = 3  # float layers that a warning names


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One layer. Bytes cover codes, scales and the adapter; the bias counts as float."""

    name: str
    type: str
    shape: tuple[int, ...]
    encoding: str
    n_weights: int
    grid: Grid
    entropy: float  # bits a weight, of the codes as they are
    level_shares: tuple[float, ...]
    scale_min: float
    scale_max: float
    n_scales: int
    disk_bytes: int
    memory_bytes: int
    rank: int  # of the low-rank adapter, 0 without
    adapter_bytes: int  # its factors and scales; part of disk_bytes and memory_bytes
    panel_bytes: int | None  # repacked for the kernels, beside the words; 0: decoded at each call

    @property
    def levels(self) -> int:
        return self.grid.n_levels

    @property
    def information_bits(self) -> float:
        """log2(levels), a weight."""
        return self.grid.bits

    @property
    def memory_bits(self) -> float:
        return bits(self.memory_bytes, self.n_weights)

    @property
    def disk_bits(self) -> float:
        return bits(self.disk_bytes, self.n_weights)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "shape": list(self.shape),
            "encoding": self.encoding,
            "weights": self.n_weights,
            "levels": self.levels,
            "bits_per_weight": {
                "information": self.information_bits,
                "memory": self.memory_bits,
                "disk": self.disk_bits,
            },
            "bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "panel_bytes": self.panel_bytes,
            "entropy": self.entropy,
            "level_shares": list(self.level_shares),
            "rank": self.rank,
            "adapter_bytes": self.adapter_bytes,
            "scale": {"count": self.n_scales, "min": self.scale_min, "max": self.scale_max},
        }


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """A tensor that is stored as it is. n_bytes: at its own width.

    float16_bytes: the same in float16; integers keep their width. buffer: it is no parameter.
    """

    name: str
    n_values: int
    n_bytes: int
    float16_bytes: int
    buffer: bool

    @property
    def layer(self) -> str:
        """The module that it belongs to; its own name at the root."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """The float tensors of one module, biases of quantized layers included."""

    name: str
    tensors: tuple[FloatTensor, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(tensor.name.rpartition(".")[2] for tensor in self.tensors)

    @property
    def n_values(self) -> int:
        return sum(tensor.n_values for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class SizeReport:
    """A whole file.

    distance: of the float weights to their levels, as the file says. tier: the instruction set that
    the panels are for. knows_buffers: whether the file says which float tensors are no parameters;
    where it does not, all that are not integers count as parameters.
    """

    path: str
    network: dict[str, Any] | None
    layers: tuple[LayerSize, ...]
    float_tensors: tuple[FloatTensor, ...]  # what stayed float, biases and buffers included
    file_bytes: int
    distance: float | None = None
    tier: str | None = None
    knows_buffers: bool = True

    @property
    def panel_bytes(self) -> int | None:
        """Of all layers; None where the network cannot be built from the file.

        Panels are made at the first product, beside the words.
        """
        known = [layer.panel_bytes for layer in self.layers if layer.panel_bytes is not None]
        return sum(known) if known else None

    @property
    def n_weights(self) -> int:
        """Of the quantized layers."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def disk_bytes(self) -> int:
        """Codes, scales and adapters of all layers."""
        return sum(layer.disk_bytes for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        return sum(layer.memory_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.float_tensors)

    @property
    def overhead_bytes(self) -> int:
        """Manifest and header."""
        return self.file_bytes - self.disk_bytes - self.float_bytes

    @property
    def float_parameters(self) -> tuple[FloatTensor, ...]:
        return tuple(tensor for tensor in self.float_tensors if not tensor.buffer)

    @property
    def buffers(self) -> tuple[FloatTensor, ...]:
        return tuple(tensor for tensor in self.float_tensors if tensor.buffer)

    @property
    def n_parameters(self) -> int:
        """Of the whole network: quantized weights and float parameters."""
        return self.n_weights + sum(tensor.n_values for tensor in self.float_parameters)

    @property
    def parameter_bytes(self) -> int:
        """On disk, of the whole network."""
        return self.disk_bytes + sum(tensor.n_bytes for tensor in self.float_parameters)

    @property
    def float16_bytes(self) -> int:
        """What the same network takes in float16: every weight and float tensor, nothing else."""
        return 2 * self.n_weights + sum(tensor.float16_bytes for tensor in self.float_tensors)

    @property
    def reduction(self) -> float:
        """Float32 bytes of the quantized weights over their bytes on disk."""
        return 4 * self.n_weights / max(1, self.disk_bytes)

    @property
    def warning(self) -> str | None:
        """What is wrong with how the weights were rounded, if the file says so."""
        return None if self.distance is None else far_from_levels(self.distance)

    @property
    def float16_warning(self) -> str | None:
        """That the file is not smaller than the network in float16, and what takes the bytes."""
        if self.file_bytes < self.float16_bytes:
            return None
        rows = self.float_folds()
        named = [f"{row.name} {fold_bytes(row):,} bytes" for row in rows[:_NAMED]]
        named += [f"{len(rows) - _NAMED} more"] if len(rows) > _NAMED else []
        kept = f"{self.float_bytes:,} bytes stayed float" + (f" ({', '.join(named)})" * bool(named))
        return (
            f"the file of {self.file_bytes:,} bytes is not smaller than the same network in "
            f"float16, {self.float16_bytes:,} bytes: {kept}, manifest and header take "
            f"{self.overhead_bytes:,}"
        )

    def float_folds(self) -> tuple[Fold[FloatLayer], ...]:
        """Modules with float tensors, alike ones together, the largest first."""
        groups: dict[str, list[FloatTensor]] = {}
        for tensor in self.float_tensors:
            groups.setdefault(tensor.layer, []).append(tensor)
        found = folds(
            (FloatLayer(name, tuple(own)) for name, own in groups.items()),
            lambda layer: layer.name,
            lambda layer: (layer.parts, tuple((t.n_values, t.n_bytes) for t in layer.tensors)),
        )
        return tuple(sorted(found, key=fold_bytes, reverse=True))

    def weighted(self, per_weight: Iterable[float]) -> float:
        """Mean of a figure per weight over all weights, from one value per layer."""
        pairs = zip(per_weight, self.layers, strict=True)
        return sum(value * layer.n_weights for value, layer in pairs) / max(1, self.n_weights)

    def to_dict(self) -> dict[str, Any]:
        """`bytes` is the whole file; `layer_bytes` the codes, scales and adapters in it.

        `bits_per_weight` is of the quantized layers, `whole` of all parameters and of the file.
        """
        return {
            "file": self.path,
            "network": self.network,
            "weights": self.n_weights,
            "bits_per_weight": {
                "information": self.weighted(layer.information_bits for layer in self.layers),
                "memory": bits(self.memory_bytes, self.n_weights),
                "disk": bits(self.disk_bytes, self.n_weights),
            },
            "whole": {
                "parameters": self.n_parameters,
                "parameter_bits_per_weight": bits(self.parameter_bytes, self.n_parameters),
                "file_bits_per_weight": bits(self.file_bytes, self.n_parameters),
                "float16_bytes": self.float16_bytes,
                "float16_warning": self.float16_warning,
                "knows_buffers": self.knows_buffers,
            },
            "bytes": self.file_bytes,
            "layer_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "panels": {"tier": self.tier, "bytes": self.panel_bytes},
            "float_bytes": self.float_bytes,
            "overhead_bytes": self.overhead_bytes,
            "entropy": self.weighted(layer.entropy for layer in self.layers),
            "reduction": self.reduction,
            "distance": self.distance,
            "warning": self.warning,
            "layers": [layer.to_dict() for layer in self.layers],
            "float": [
                {"name": t.name, "bytes": t.n_bytes, "values": t.n_values, "buffer": t.buffer}
                for t in self.float_tensors
            ],
        }


def bits(n_bytes: int, n_weights: int) -> float:
    """Bits per weight."""
    return 8 * n_bytes / max(1, n_weights)


def fold_bytes(fold: Fold[FloatLayer]) -> int:
    """Of all its layers."""
    return sum(layer.n_bytes for layer in fold.items)


def size_report(path: str | Path) -> SizeReport:
    """Measure a packed file. Raises SubbyteError if it is not one."""
    artifact = read(path)
    try:
        layers = artifact.layers()
    except SubbyteError as error:
        raise of_file(path, error) from None
    net = _network(artifact)
    panels = {} if net is None else _panels(net)
    sizes = tuple(
        _layer_size(name, entry, layers[name], artifact, panels.get(name))
        for name, entry in artifact.entries.items()
    )
    return SizeReport(
        str(path), artifact.network, sizes, _float_tensors(artifact, net), artifact.n_bytes,
        artifact.distance, kernels.tier(), net is not None,
    )  # fmt: skip


def _network(artifact: Artifact) -> nn.Module | None:
    """The network in the file, if it opens without its class."""
    try:
        return assemble(artifact)
    except SubbyteError:
        return None


def _float_tensors(artifact: Artifact, net: nn.Module | None) -> tuple[FloatTensor, ...]:
    biases = [join(name, "bias") for name, entry in artifact.entries.items() if entry.bias]
    parameters = None if net is None else {name for name, _ in net.named_parameters()}
    # What became of a BatchNorm's two parameters
    affine = {join(name, part) for name in artifact.affine for part in ("scale", "shift")}
    found = []
    for name in (*artifact.state_names, *biases):
        tensor = artifact.tensors[name]
        floating = tensor.is_floating_point()
        parameter = floating if parameters is None else name in parameters or name in affine
        width = 2 if floating else tensor.element_size()
        n_values = tensor.numel()
        found.append(FloatTensor(name, n_values, _n_bytes(tensor), width * n_values, not parameter))
    return tuple(found)


def _panels(net: nn.Module) -> dict[str, int]:
    """Bytes of each layer's panels, 0 for one that the kernels do not serve."""
    for matrix, window in _served(net):
        panel_of(matrix.matrix(), window)
    return {layer.name: kernels.panel_bytes(layer.weight.words) for layer in packed_layers(net)}


def _served(net: nn.Module) -> Iterable[tuple[PackedWeight, kernels.Window | None]]:
    """The weights that the kernels multiply, with the windows of convolutions."""
    unread = _unread(net)
    for module in net.modules():
        if isinstance(module, PackedLinear):
            if module not in unread and not module.why_not(torch.empty(0)):
                yield module.packed, None
        elif isinstance(module, PackedConv2d):
            if not module.why_not(torch.empty(0)):
                yield module.packed, module.window
        elif isinstance(module, PackedMultiheadAttention) and not _why_not(module):
            assert isinstance(module.in_proj, PackedWeight)
            yield module.in_proj, None


def _unread(net: nn.Module) -> set[nn.Module]:
    """Layers whose weight is decoded by the attention that they are a part of."""
    attention = (module for module in net.modules() if isinstance(module, PackedMultiheadAttention))
    return {module.out_proj for module in attention if _why_not(module)}


def _why_not(module: PackedMultiheadAttention) -> str | None:
    """Why plain self-attention, as a network calls it, would not use the kernels."""
    token = torch.empty(1, 1, module.embed_dim)
    return module.why_not(token, token, token, need_weights=False)


def _layer_size(
    name: str, entry: LayerEntry, layer: QuantizedLayer, artifact: Artifact, panels: int | None
) -> LayerSize:
    codes, scale, grid = layer.weight.codes, layer.weight.scale, entry.grid
    beside = _n_bytes(artifact.tensors[join(name, "scale")])
    adapter_bytes = 0 if layer.adapter is None else layer.adapter.n_bytes
    beside += adapter_bytes
    return LayerSize(
        name,
        entry.type,
        entry.shape,
        entry.encoding,
        codes.numel(),
        grid,
        entropy(codes, grid.n_levels),
        tuple(level_shares(codes, grid.n_levels).tolist()),
        float(scale.min()) if scale.numel() else 0.0,
        float(scale.max()) if scale.numel() else 0.0,
        scale.numel(),
        _n_bytes(artifact.tensors[join(name, "codes")]) + beside,
        8 * radix.n_words(codes.numel(), grid.n_levels) + beside,
        0 if layer.adapter is None else layer.adapter.rank,
        adapter_bytes,
        panels,
    )


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
