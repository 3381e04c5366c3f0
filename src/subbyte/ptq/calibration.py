"""What a layer sees and what the loss makes of it: sums over calibration images, streamed.

An error e_o in row w_o of a Linear or a convolution changes the output by e_o x for every input
patch x. Two statistics are enough for everything that follows:

    gram H   = mean over patches of x x'                (a matrix a group)
    effect F = E |dL/dw_o|^2 / trace H                  (a number a row)

e_o H e_o' is the mean squared change of output channel o, and 1/2 F_o e_o H e_o' predicts the
change of the loss: the Fisher information of the row, factored as F_o H (as K-FAC does). L is the
cross-entropy with labels drawn from the network's own softmax: real labels are never needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.errors import SubbyteError
from subbyte.layers import Site

GRAM_BYTES = 3 * 2**29  # 1.5 GiB of sums at once; more layers take another pass over the images
_PATCH_VALUES = 2**24  # float32 values of one chunk of patches
MEASURED = ("Linear", "Conv1d", "Conv2d", "MultiheadAttention")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """gram: float64 [groups, width, width], mean of x x' over patches. patches: how many."""

    gram: Tensor
    patches: int


def input_statistics(
    model: nn.Module,
    layers: Sequence[Site],
    batches: Sequence[Tensor],
    *,
    limit: int = GRAM_BYTES,
) -> dict[str, Statistics]:
    """Statistics of each layer's input, in the order in which the network runs the layers.

    batches: inputs of the network, gone through once for every `limit` bytes of sums. Layers of a
    type outside MEASURED, and those that the batches never reach, are left out. Raises SubbyteError
    for no batches and for an input that is not finite, naming the layer.
    """
    if not len(batches):
        raise SubbyteError("no calibration batches; give at least one image")
    found: dict[str, Statistics] = {}
    for part in _passes(layers, limit):
        found |= _one_pass(model, part, batches)
    return found


def _passes(layers: Sequence[Site], limit: int) -> Iterator[list[Site]]:
    """The layers in groups whose sums fit the limit (one layer at least)."""
    part: list[Site] = []
    size = 0
    for site in layers:
        if site.type not in MEASURED:
            continue
        width = site.n_weights // max(1, site.shape[0])
        needs = 8 * width * width * (site.shape[0] if _is_depthwise(site) else 1)
        if part and size + needs > limit:
            yield part
            part, size = [], 0
        part.append(site)
        size += needs
    if part:
        yield part


def _is_depthwise(site: Site) -> bool:
    """An upper bound for groups, which a site does not know: one input channel a group."""
    return site.type.startswith("Conv") and site.shape[1] == 1


@torch.no_grad()
def _one_pass(
    model: nn.Module, layers: Sequence[Site], batches: Sequence[Tensor]
) -> dict[str, Statistics]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, patches: Iterable[Tensor]) -> None:
        """patches: chunks [groups, width, n]."""
        for chunk in patches:
            if not chunk.isfinite().all():
                raise SubbyteError(
                    f"the input of layer '{name}' has NaN or infinite values on the calibration "
                    "images; check the images and the weights before it"
                )
            product = (chunk @ chunk.transpose(1, 2)).double()
            sums[name] = sums[name].add_(product) if name in sums else product
            counts[name] = counts.get(name, 0) + chunk.shape[2]

    with inputs_of(model, layers, add):
        for x in batches:
            model(x)
    return {name: Statistics(sums[name] / counts[name], counts[name]) for name in sums}


Receiver = Callable[[str, Iterator[Tensor]], None]


@contextmanager
def inputs_of(model: nn.Module, layers: Sequence[Site], receive: Receiver) -> Iterator[None]:
    """While it is open, every forward pass hands each layer's input patches to `receive`."""
    by_owner: dict[str, list[Site]] = {}
    for site in layers:
        by_owner.setdefault(site.owner, []).append(site)
    handles = []
    try:
        for owner, own in by_owner.items():
            module = model.get_submodule(owner)
            make = _attention_hook if isinstance(module, nn.MultiheadAttention) else _layer_hook
            handles.append(module.register_forward_hook(make(own, receive), with_kwargs=True))
        for path, module in model.named_modules():
            inner = f"{path}.out_proj".lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and inner in by_owner:
                hook = _out_proj_hook(inner, receive)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(own: list[Site], receive: Receiver) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = args[0] if args else kwargs["input"]
        receive(own[0].name, patches_of(module, x))

    return hook


def _attention_hook(own: list[Site], receive: Receiver) -> Callable[..., None]:
    """The projections see query, key and value; a joint one, which multiplies all, the three."""

    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        streams = {"q_proj": ["query"], "k_proj": ["key"], "v_proj": ["value"]}
        for site in own:
            names = streams.get(site.parameter.removesuffix("_weight"), ["query", "key", "value"])
            tensors = list({id(given[name]): given[name] for name in names}.values())
            for x in tensors:
                receive(site.name, _rows(x))

    return hook


def _out_proj_hook(name: str, receive: Receiver) -> Callable[..., None]:
    """Attention reads out_proj's weight without calling it: run again with the identity there."""

    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> None:
        twin = copy.copy(module)
        identity = nn.Linear(module.embed_dim, module.embed_dim).to(module.out_proj.weight)
        nn.init.eye_(identity.weight)
        nn.init.zeros_(identity.bias)
        twin._modules = {**module._modules, "out_proj": identity}
        receive(name, _rows(type(module).forward(twin, *args, **kwargs)[0]))

    return hook


def patches_of(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Chunks [groups, width, n] of what the layer's weight rows are multiplied with."""
    if isinstance(module, nn.Linear):
        yield from _rows(x)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        yield from _windows(module, x)
    else:
        raise TypeError(type(module))


def _rows(x: Tensor) -> Iterator[Tensor]:
    rows = x.detach().reshape(-1, x.shape[-1])
    for part in rows.split(max(1, _PATCH_VALUES // max(1, x.shape[-1]))):
        yield part.t()[None]


def _windows(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """im2col, some images at a time; [groups, in / groups * kh * kw, images * positions]."""
    x = x.detach()
    one_dim = isinstance(module, nn.Conv1d)
    batched = x if x.ndim == (3 if one_dim else 4) else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(batched, module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if one_dim:
        padded = padded[:, :, None]
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    width = padded.shape[1] * kernel[0] * kernel[1]
    images = max(1, _PATCH_VALUES // max(1, width * padded.shape[2] * padded.shape[3]))
    for part in padded.split(images):
        columns = F.unfold(part, kernel, dilation=dilation, stride=stride)  # type: ignore[arg-type]
        per_group = columns.shape[1] // module.groups
        yield columns.transpose(0, 1).reshape(module.groups, per_group, -1)


def effects(
    model: nn.Module,
    layers: Sequence[Site],
    statistics: Mapping[str, Statistics],
    batches: Sequence[Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The effect F of each row, float64 [out]: 1/2 F_o e_o H e_o' nats an image for an error e_o.

    The gradient of a batch's summed loss, squared, estimates the sum of the images' squared
    gradients, because labels drawn from the softmax make them independent with mean zero.
    """
    known = [site for site in layers if site.name in statistics]
    weights = [getattr(model.get_submodule(site.owner), site.parameter) for site in known]
    sums = [torch.zeros(site.shape[site.channel_axis], dtype=torch.float64) for site in known]
    images = 0
    for x in batches:
        with torch.enable_grad():
            logits = model(x).flatten(0, -2)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.double().square().flatten(1).sum(1).cpu()
        images += len(x)
    found = {}
    for site, total in zip(known, sums, strict=True):
        gram = statistics[site.name].gram
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        per_row = trace.repeat_interleave(len(total) // len(trace))
        found[site.name] = total / images / per_row.clamp(min=torch.finfo(torch.float64).tiny)
    return found
