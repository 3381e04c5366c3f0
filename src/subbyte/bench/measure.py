"""Packed layers against float ones, in the network that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subbyte import kernels
from subbyte.bench.floats import PACKED_TYPES, float_twin
from subbyte.bench.report import BenchReport, LayerBench, Times
from subbyte.bench.roofs import Roofs, measure_roofs
from subbyte.bench.timing import in_turn
from subbyte.errors import SubbyteError
from subbyte.graph.fuse import fuse
from subbyte.modules import PackedConv2d, PackedEmbedding, PackedWeight, is_fused

_ROOFS_SHARE, _NETWORK_SHARE = 0.1, 0.2  # of the time; layers get the rest


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A packed layer with what it was called with."""

    name: str
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def bench(
    net: nn.Module,
    example: Tensor,
    *,
    target: str = "network",
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    seconds: float = 20.0,
    whole: bool = True,
) -> BenchReport:
    """Time a packed network, layer by layer and as a whole, on this machine.

    example: one input without its batch dimension. batches: batch sizes. threads: of PyTorch and
    the kernels, as PyTorch has them by default. seconds: about how long all of it takes. whole:
    also the network itself. Raises SubbyteError for a network without packed layers, an input that
    it does not take, or settings that cannot be. Seven parameters: each is a setting of its own
    that the command line offers under the same name.
    """
    _check(batches, threads, seconds)
    with torch.inference_mode(), _threads(threads):
        calls = {n: _calls(net, _batch_of(example, n), target) for n in batches}
        n_rows = sum(map(len, calls.values()))
        roofs = measure_roofs(torch.get_num_threads(), _ROOFS_SHARE * seconds)
        share = (1 - _ROOFS_SHARE - (_NETWORK_SHARE if whole else 0)) * seconds / n_rows
        layers = [_layer(call, n, roofs, share) for n in batches for call in calls[n]]
        networks: list[tuple[int, Times]] = []
        if whole:
            share, twin = _NETWORK_SHARE * seconds / len(batches), float_twin(net)
            fused = _fused(net)
            networks = [
                (n, _times(net, twin, (_batch_of(example, n),), {}, share, fused)) for n in batches
            ]
        return BenchReport(
            target, kernels.tier(), torch.get_num_threads(), _precision(net), roofs,
            tuple(layers), tuple(networks),
        )  # fmt: skip


def _check(batches: Sequence[int], threads: int | None, seconds: float) -> None:
    for batch in batches:
        if batch < 1:
            raise SubbyteError(f"batch={batch}; use 1 or more")
    if threads is not None and threads < 1:
        raise SubbyteError(f"threads={threads}; use 1 or more")
    if not 0 < seconds < float("inf"):
        raise SubbyteError(f"seconds={seconds}; use a time above 0")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch_of(example: Tensor, n: int) -> Tensor:
    """Images lie with their channels together, which suits PyTorch's convolutions and ours."""
    x = example.expand(n, *example.shape).contiguous()
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _calls(net: nn.Module, x: Tensor, target: str) -> list[_Call]:
    """Every packed layer that the network calls, with its activations."""
    found: list[_Call] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: found.append(
                _Call(name or "layer", module, args, kwargs)
            ),
            with_kwargs=True,
        )
        for name, module in net.named_modules()
        if isinstance(module, PACKED_TYPES) and not isinstance(module, PackedEmbedding)
    ]
    try:
        net(x)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise SubbyteError(
            f"{target} does not take an input of {tuple(x.shape)}: {reason}"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise SubbyteError(f"{target} calls no packed layer; bench takes the result of pack()")
    return found


def _layer(call: _Call, batch: int, roofs: Roofs | None, seconds: float) -> LayerBench:
    layer, reason = call.layer, _why_not(call)
    twin = float_twin(layer)
    times = _times(layer, twin, call.args, call.kwargs, seconds)
    with FlopCounterMode(display=False) as counter:
        twin(*call.args, **call.kwargs)
    operations = int(counter.get_total_flops())
    weights = [m for m in layer.modules() if isinstance(m, PackedWeight)]
    packed = weights[0]
    n_bytes = 0 if reason else sum(kernels.panel_bytes(weight.words) for weight in weights)
    planes = 2 if getattr(layer, "precision", "") == "int16" else 1
    depthwise = isinstance(layer, PackedConv2d) and kernels.is_depthwise(packed.shape, layer.groups)
    ran = _ran(call, reason, depthwise)
    in_bytes = ran.endswith(("int8", "int16"))
    least = roofs.seconds(n_bytes, planes * operations) if roofs and in_bytes else None
    return LayerBench(
        call.name, type(layer).__name__.removeprefix("Packed"), tuple(packed.shape),
        packed.grid.n_levels, batch, times, operations, n_bytes, reason, least, ran,
    )  # fmt: skip


def _ran(call: _Call, reason: str | None, depthwise: bool) -> str:
    """What computes a layer: an instruction set and a precision, or PyTorch on a decoded weight."""
    layer, x = call.layer, call.args[0] if call.args else next(iter(call.kwargs.values()))
    if isinstance(layer, PackedConv2d):
        columns = kernels.pixels(x, layer.packed.shape, layer.window)
    else:
        columns = x.numel() // max(1, x.shape[-1])
    precision = getattr(layer, "precision", "float32")
    if reason or (not depthwise and kernels.decodes(precision, columns)):
        return "PyTorch float32, decoded"
    return f"{kernels.tier()} {'float32' if depthwise else precision.replace('auto', 'int8')}"


def _why_not(call: _Call) -> str | None:
    """As the layer itself asks."""
    layer: Any = call.layer
    if hasattr(layer, "why_not"):
        reason: str | None = layer.why_not(*call.args, **call.kwargs)
        return reason
    return f"there is no kernel for {type(layer).__name__.removeprefix('Packed')}"


def _times(
    packed: nn.Module,
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float,
    fused: nn.Module | None = None,
) -> Times:
    """Of one call with these arguments."""
    calls: dict[str, Callable[[], Any]] = {
        "packed": partial(packed, *args, **kwargs),
        "float32": partial(twin, *args, **kwargs),
    }
    if fused is not None:
        calls["fused"] = partial(fused, *args, **kwargs)
    if has_bfloat16():
        narrow = copy.deepcopy(twin).to(torch.bfloat16)
        calls["bfloat16"] = partial(narrow, *map(_to_bfloat16, args), **kwargs)
    found = in_turn(calls, seconds)
    return Times(found["packed"], found["float32"], found.get("bfloat16"), found.get("fused"))


def _fused(net: nn.Module) -> nn.Module | None:
    """None where the network cannot be traced, or is fused already."""
    if is_fused(net):
        return None
    try:
        return fuse(net)
    except SubbyteError:
        return None


def _to_bfloat16(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if floating else value


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16; PyTorch imitates it elsewhere, slowly."""
    return any(yes for name, yes in torch.cpu.get_capabilities().items() if "bf16" in name)


def _precision(net: nn.Module) -> str:
    """Of the activations; several where layers differ."""
    found: set[Any] = {m.precision for m in net.modules() if hasattr(m, "precision")}
    return "/".join(sorted(found)) or "float32"
