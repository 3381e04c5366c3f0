"""Levels, ranks, groups and bytes of every layer, and the solver that follows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from subbyte.core.grids import PerTensor, ScaleDomain
from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.quantized import Quantized
from subbyte.core.sites import bias_of
from subbyte.core.tensors import QuantizedLayer
from subbyte.errors import SubbyteError
from subbyte.ptq.cora import CoRa, solve_layer
from subbyte.ptq.plan.search import GROUPS, LEVELS, Layer, layer_bytes, search
from subbyte.ptq.run import Run

_CONVOLUTIONS = (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
)  # fmt: skip


def chosen_plan(run: Run, known: Sequence[Layer]) -> Plan:
    """Levels, ranks and bytes of every layer: as the plan says, by the method, or searched."""
    wanted = {layer.name: layer for layer in run.plan.layers}
    found: dict[str, PlannedLayer] = {}
    searched: dict[CoRa, list[Layer]] = {}
    for layer in known:
        own = wanted[layer.site.name]
        method: CoRa = own.method
        if own.levels is None and method.target_bits is not None:
            searched.setdefault(method, []).append(layer)
        else:
            levels = own.levels or method.n_levels
            group = _group(layer, method) if own.levels is None else own.group
            found[own.name] = _sized(layer, replace(own, levels=levels, group=group), method)
    for method, layers in searched.items():
        found |= {layer.name: layer for layer in _searched(run, layers, method).layers}
    chosen = (replace(found.get(x.name, x), method=None) for x in run.plan.layers)
    return replace(run.plan, layers=tuple(chosen))


def _searched(run: Run, layers: Sequence[Layer], method: CoRa) -> Plan:
    assert method.target_bits is not None
    levels = LEVELS if method.n_levels is None else (method.n_levels,)
    groups: Sequence[int | None] = () if method.group is None else (method.group,)
    if method.group is None and not any(x.type in _CONVOLUTIONS for x in run.sites.values()):
        groups = GROUPS
    layers = run.notes.over("search", layers)
    return search(
        layers, method.target_bits, levels=levels, groups=groups,
        adapter_bits=method.adapter_bits, group=run.group,
    )  # fmt: skip


def _group(layer: Layer, method: CoRa) -> int | None:
    """The method's group size, where the layer has rows of inputs that are longer."""
    fits = layer.site.channel_axis == 0 and layer.groups == 1
    wide = method.group is not None and method.group < layer.matrix.shape[1]
    return method.group if fits and wide else None


def _sized(layer: Layer, planned: PlannedLayer, method: CoRa) -> PlannedLayer:
    if planned.levels is None:
        raise SubbyteError(
            f"the plan leaves the levels of layer '{planned.name}' to a method that has none"
        )
    return replace(planned, n_bytes=layer_bytes(layer, planned, method.adapter_bits))


def solver_of(run: Run, chosen: Plan) -> Callable[[Layer], QuantizedLayer]:
    """Codes, adapter and bias of a layer, as the plan says."""
    planned = {layer.name: layer for layer in chosen.layers}
    methods = {layer.name: layer.method for layer in run.plan.layers}

    def solve(layer: Layer) -> QuantizedLayer:
        name, bias = layer.site.name, bias_of(run.teacher, layer.site)
        solved = solve_layer(layer, planned[name], methods[name])
        return replace(solved, bias=None if bias is None else bias.clone())

    return solve


def compensates(run: Run) -> bool:
    return any(method.solver.compensates for method in run.methods)


def note_scales(run: Run, done: Quantized) -> None:
    for name, layer in done.layers.items():
        grid = layer.weight.grid
        if not isinstance(grid.granularity, PerTensor) and grid.scale_domain is ScaleDomain.FLOAT32:
            run.notes.add(
                f"layer '{name}' has float32 scales: its weights need some that float16 has not"
            )


def as_solved(plan: Plan, layers: Mapping[str, QuantizedLayer]) -> Plan:
    """The plan with the bytes that the layers really take."""
    sized = [
        replace(x, n_bytes=layers[x.name].n_bytes) if x.name in layers else x for x in plan.layers
    ]
    return replace(plan, layers=tuple(sized))
