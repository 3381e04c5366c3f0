"""What a packed file weighs: bits, bytes, entropy and scales, a layer at a time and in total."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from subbyte import kernels
from subbyte.core.functional import entropy, level_shares
from subbyte.core.sites import join
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.modules import PackedConv2d, PackedLinear, PackedMultiheadAttention
from subbyte.packing import radix
from subbyte.storage import WORDS, Artifact, LayerEntry, assemble, packed_layers, read
from subbyte.train.watch import far_from_levels


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One layer. Bytes cover codes, scales and the adapter; the bias counts as float."""

    name: str
    type: str
    shape: tuple[int, ...]
    encoding: str
    n_weights: int
    levels: int
    information_bits: float  # log2(levels), a weight
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
                "memory": bits(self.memory_bytes, self.n_weights),
                "disk": bits(self.disk_bytes, self.n_weights),
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
class SizeReport:
    """A whole file."""

    path: str
    network: dict[str, Any] | None
    layers: tuple[LayerSize, ...]
    float_tensors: tuple[tuple[str, int], ...]  # name, bytes: what stayed float, biases included
    file_bytes: int
    distance: float | None = None  # of the float weights to their levels, as the file says
    tier: str | None = None  # the instruction set that the panels are for

    @property
    def panel_bytes(self) -> int | None:
        """Of all layers; None where the network cannot be built from the file, or has no kernels.

        Panels are made at the first product, beside the words.
        """
        known = [layer.panel_bytes for layer in self.layers if layer.panel_bytes is not None]
        return sum(known) if known else None

    @property
    def n_weights(self) -> int:
        return sum(layer.n_weights for layer in self.layers)

    @property
    def disk_bytes(self) -> int:
        """Codes, scales and adapters of all layers."""
        return sum(layer.disk_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        return sum(count for _, count in self.float_tensors)

    @property
    def reduction(self) -> float:
        """Float32 bytes of the quantized weights over their bytes on disk."""
        return 4 * self.n_weights / max(1, self.disk_bytes)

    @property
    def warning(self) -> str | None:
        """What is wrong with how the weights were rounded, if the file says so."""
        return None if self.distance is None else far_from_levels(self.distance)

    def weighted(self, per_weight: Iterable[float]) -> float:
        """Mean of a figure a weight over all weights, from one value a layer."""
        pairs = zip(per_weight, self.layers, strict=True)
        return sum(value * layer.n_weights for value, layer in pairs) / max(1, self.n_weights)

    def to_dict(self) -> dict[str, Any]:
        """`bytes` is the whole file; `layer_bytes` the codes, scales and adapters in it."""
        memory = sum(layer.memory_bytes for layer in self.layers)
        return {
            "file": self.path,
            "network": self.network,
            "weights": self.n_weights,
            "bits_per_weight": {
                "information": self.weighted(layer.information_bits for layer in self.layers),
                "memory": bits(memory, self.n_weights),
                "disk": bits(self.disk_bytes, self.n_weights),
            },
            "bytes": self.file_bytes,
            "layer_bytes": self.disk_bytes,
            "memory_bytes": memory,
            "panels": {"tier": self.tier, "bytes": self.panel_bytes},
            "float_bytes": self.float_bytes,
            "overhead_bytes": self.file_bytes - self.disk_bytes - self.float_bytes,
            "entropy": self.weighted(layer.entropy for layer in self.layers),
            "reduction": self.reduction,
            "distance": self.distance,
            "warning": self.warning,
            "layers": [layer.to_dict() for layer in self.layers],
            "float": [{"name": name, "bytes": count} for name, count in self.float_tensors],
        }


def bits(n_bytes: int, n_weights: int) -> float:
    """Bits a weight."""
    return 8 * n_bytes / max(1, n_weights)


def size_report(path: str | Path) -> SizeReport:
    """Measure a packed file. Raises SubbyteError if it is not one."""
    artifact = read(path)
    try:
        layers = artifact.layers()
    except SubbyteError as error:
        raise SubbyteError(f"{path}: {error}") from None
    panels = _panels(artifact)
    sizes = tuple(
        _layer_size(name, entry, layers[name], artifact, panels.get(name))
        for name, entry in artifact.entries.items()
    )
    biases = [join(name, "bias") for name, entry in artifact.entries.items() if entry.bias]
    kept = [(name, _n_bytes(artifact.tensors[name])) for name in (*artifact.state_names, *biases)]
    return SizeReport(
        str(path), artifact.network, sizes, tuple(kept), artifact.n_bytes, artifact.distance,
        kernels.tier(),
    )  # fmt: skip


@torch.inference_mode()
def _panels(artifact: Artifact) -> dict[str, int]:
    """Bytes of each layer's panels, made by one product with zeros; none where the kernels do not
    serve a layer, or the file does not say its network."""
    try:
        net = assemble(artifact)
    except SubbyteError:
        return {}
    for module in net.modules():
        if isinstance(module, PackedLinear):
            module(torch.zeros(1, module.in_features))
        elif isinstance(module, PackedConv2d):
            kernel = zip(module.packed.shape[2:], module.dilation, strict=True)
            field = (dilation * (side - 1) + 1 for side, dilation in kernel)
            module(torch.zeros(1, module.packed.shape[1] * module.groups, *field))
        elif isinstance(module, PackedMultiheadAttention):
            token = torch.zeros(1, 1, module.embed_dim)
            if not module.why_not(token, token, token, need_weights=False):
                module(token, token, token, need_weights=False)
    return {layer.name: kernels.panel_bytes(layer.weight.words) for layer in packed_layers(net)}


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
        grid.n_levels,
        grid.bits,
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


def table(report: SizeReport) -> Table:
    """The report for people."""
    view = Table(
        title=escape(report.path), caption=escape(_caption(report)), caption_justify="left"
    )
    adapted = any(layer.rank for layer in report.layers)
    for heading in ("layer", "type", "shape", "levels", *(("rank",) if adapted else ())):
        view.add_column(heading, overflow="fold")
    for heading in ("bits", "memory", "disk", "entropy", "bytes", "panels", "scale"):
        view.add_column(heading, justify="right", overflow="fold")
    view.add_column("share of each level, %", overflow="fold")
    for layer in report.layers:
        view.add_row(*_row(layer, adapted))
    total = report.to_dict()
    per = total["bits_per_weight"]
    figures = (per["information"], per["memory"], per["disk"], total["entropy"])
    view.add_section()
    blank = ("",) * (1 + adapted)
    view.add_row("total", "", f"{report.n_weights:,}", *blank, *(f"{f:.3f}" for f in figures),
                 f"{report.disk_bytes:,}", _count(report.panel_bytes), "", "")  # fmt: skip
    return view


def _row(layer: LayerSize, adapted: bool) -> tuple[str, ...]:
    """adapted: whether the table has a column for ranks."""
    disk, memory = (bits(b, layer.n_weights) for b in (layer.disk_bytes, layer.memory_bytes))
    low, high = f"{layer.scale_min:.3g}", f"{layer.scale_max:.3g}"
    return (
        escape(layer.name),
        escape(layer.type),
        "x".join(map(str, layer.shape)),
        str(layer.levels),
        *((str(layer.rank),) if adapted else ()),
        f"{layer.information_bits:.3f}",
        f"{memory:.3f}",
        f"{disk:.3f}",
        f"{layer.entropy:.3f}",
        f"{layer.disk_bytes:,}",
        _count(layer.panel_bytes),
        low if layer.n_scales == 1 else f"{low} .. {high}",
        _shares(layer),
    )


def _count(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes:,}"


def _shares(layer: LayerSize) -> str:
    """Shares in percent; more than 9 levels are shown from the lowest to the highest share."""
    if layer.levels <= 9:
        return " ".join(f"{100 * share:.0f}" for share in layer.level_shares)
    return f"{100 * min(layer.level_shares):.1f} .. {100 * max(layer.level_shares):.1f}"


def _caption(report: SizeReport) -> str:
    zipped = any(layer.encoding != WORDS for layer in report.layers)
    overhead = report.file_bytes - report.disk_bytes - report.float_bytes
    return (
        f"bits a weight: log2(levels), in memory, on disk{' (zstd)' if zipped else ''}\n"
        f"file {report.file_bytes:,} bytes = layers {report.disk_bytes:,} + float "
        f"{report.float_bytes:,} + manifest and header {overhead:,}; quantized weights "
        f"{report.reduction:.1f}x smaller than float32\n"
        f"{_panel_words(report)}\n"
        f"stayed float, bytes by layer: {', '.join(_float_layers(report))}"
        + (f"\nwarning: {report.warning}" if report.warning else "")
    )


def _panel_words(report: SizeReport) -> str:
    if report.tier is None:
        return "panels: none, the C++ core was not built; every layer decodes at each call"
    if report.panel_bytes is None:
        return "panels: not known, the file does not name a network of ours"
    return (
        f"panels: bytes repacked for {report.tier} at the first product, beside the words; 0: the "
        "layer decodes at each call"
    )


def _float_layers(report: SizeReport) -> list[str]:
    """`name bytes` of each layer that holds float tensors, the largest first."""
    sums: dict[str, int] = {}
    for name, count in report.float_tensors:
        layer = name.rpartition(".")[0] or name
        sums[layer] = sums.get(layer, 0) + count
    return [f"{name} {count:,}" for name, count in sorted(sums.items(), key=lambda kv: -kv[1])]
