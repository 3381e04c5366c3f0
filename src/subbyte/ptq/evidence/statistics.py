"""What a layer sees and what the loss makes of it: sums over calibration images, streamed.

An error e_o in row w_o of a Linear or a convolution changes the output by e_o x for every input
patch x, so that e_o H e_o' is the mean squared change of output channel o, with

    gram H   = mean over patches of x x'                (a matrix per group)

What the loss makes of such a change is in `sensitivity`. Padding, as the task's mask has it, is no
input.

Few patches look more alike than all: codes solved for their H have their error where nobody has
looked yet. `shrunk` takes the correlations for as sure as the patches are many.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.core.group import ALONE, Group
from subbyte.core.sites import Site
from subbyte.errors import SubbyteError
from subbyte.ptq.evidence.recurrent import weight_inputs
from subbyte.tasks.base import Task, unpadded
from subbyte.tasks.batches import Batch, call

T = TypeVar("T")

GRAM_BYTES = 3 * 2**29  # 1.5 GiB of sums at once; more layers take another pass over the images
_WIDE = 512
_ENOUGH = 4  # vectors per input of a layer
_MOST_ROUNDS = 8
PATCHES = 2**17  # of a layer at least, where there are so many; more cost time and change little
_PATCH_VALUES = 2**24  # float32 values of one chunk of patches
MEASURED = ("Linear", "Conv1d", "Conv2d", "MultiheadAttention", "LSTM", "GRU", "RNN")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """gram: float64 (of wide layers float32) [groups, width, width], mean of x x' over patches.
    patches: how many."""

    gram: Tensor
    patches: int

    @property
    def trust(self) -> float:
        """n / (n + width), 0 .. 1: how far n patches are to be believed about width^2 values."""
        return self.patches / (self.patches + self.gram.shape[-1])

    def pooled(self, other: Statistics) -> Statistics:
        """Of the patches of both."""
        patches = self.patches + other.patches
        share = other.patches / patches
        return Statistics(torch.lerp(self.gram, other.gram, share), patches)

    def shrunk(self) -> Statistics:
        """As if `width` more patches had been seen, of values that do not go together.

        trust H + (1 - trust) diag H: the mean of H under the conjugate prior that knows the
        diagonal and weighs as much as it takes to fill the rank.
        """
        diagonal = torch.diag_embed(self.gram.diagonal(dim1=1, dim2=2))
        return Statistics(torch.lerp(diagonal, self.gram, self.trust), self.patches)


def input_statistics(
    model: nn.Module,
    layers: Sequence[Site],
    batches: Sequence[Batch],
    *,
    task: Task | None = None,
    limit: int = GRAM_BYTES,
    patches: int = PATCHES,
    group: Group = ALONE,
) -> dict[str, Statistics]:
    """Statistics of each layer's input, in the order in which the network runs the layers.

    batches: inputs of the network, gone through once for every `limit` bytes of sums. task: which
    of their positions are no padding. patches: a layer with many more is seen at every 2nd, 3rd,
    ... position, so that about this many are left. group: processes that share the batches; all of
    them get all sums. Layers of a type outside MEASURED, and those that the batches never reach,
    are left out. Raises SubbyteError for no batches and for an input that is not finite, naming the
    layer. Seven parameters: what is measured, on what, with which limits, by whom.
    """
    if not len(batches):
        raise SubbyteError("no calibration batches; give at least one image")
    found: dict[str, Statistics] = {}
    quota = patches_an_image(batches, patches)
    for part in _passes(layers, limit):
        sums, counts = _one_pass(model, part, group.dealt(batches), task, quota)
        totals = group.pooled(counts)
        found |= {n: _mean(total, int(totals[n])) for n, total in group.pooled(sums).items()}
    return found


def rounds_needed(vectors: int, width: int) -> int:
    """How many more inputs per example, for a layer of `width` inputs that saw so many vectors.

    None for a layer that saw as many as it has inputs.
    """
    if vectors >= width:
        return 0
    return min(_MOST_ROUNDS, -(-_ENOUGH * width // vectors) - 1)


def patches_an_image(batches: Sequence[Batch], patches: int) -> int:
    """How many of a layer's patches each image gives, for about `patches` of all."""
    return max(1, patches // sum(len(batches[i]) for i in range(len(batches))))


def _passes(layers: Sequence[Site], limit: int) -> Iterator[list[Site]]:
    """The layers in groups whose sums fit the limit (one layer at least)."""

    def needs(site: Site) -> int:
        width = site.n_weights // max(1, site.shape[0])
        return 8 * width * width * (site.shape[0] if _is_depthwise(site) else 1)

    return fitting((site for site in layers if site.type in MEASURED), needs, limit)


def fitting(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Neighbouring items whose sizes together fit the limit (one item at least)."""
    part: list[T] = []
    total = 0
    for item in items:
        more = size(item)
        if part and total + more > limit:
            yield part
            part, total = [], 0
        part.append(item)
        total += more
    if part:
        yield part


def _is_depthwise(site: Site) -> bool:
    """An upper bound for groups, which a site does not know: one input channel a group."""
    return site.type.startswith("Conv") and site.shape[1] == 1


@torch.no_grad()
def _one_pass(
    model: nn.Module,
    layers: Sequence[Site],
    batches: Sequence[Batch],
    task: Task | None,
    quota: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of x x' over the patches of each layer, and how many they are (0-dim)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    last: list[Any] = [None, 0, ()]  # an input, how often it was written to, sums of its patches

    def add(name: str, x: Tensor, patches: Iterable[Tensor]) -> None:
        """x: the input, which neighbouring layers may share. patches: chunks [groups, width, n]."""
        if last[0] is not x or last[1] != x._version:
            found = [_product(name, chunk) for chunk in patches if chunk.shape[2]]
            last[:] = x, x._version, found
        for product, count in last[2]:
            sums[name] = sums[name].add_(product) if name in sums else product.clone()
            counts[name] = counts.get(name, torch.tensor(0)) + count

    for x in batches:
        mask = None if task is None else task.mask(x)
        with inputs_of(model, layers, add, quota * len(x), mask):
            call(model, x)
    return sums, counts


def _mean(total: Tensor, count: int) -> Statistics:
    return Statistics(total.div_(count), count)


def _product(name: str, chunk: Tensor) -> tuple[Tensor, int]:
    """x x' summed over the patches of a chunk, and how many they are.

    float64; of wide layers float32, as each chunk's is: their grams are most of what is held.
    """
    if not chunk.isfinite().all():
        raise SubbyteError(
            f"the input of layer '{name}' has NaN or infinite values on the calibration "
            "images; check the images and the weights before it"
        )
    product = chunk @ chunk.transpose(1, 2)
    return product if product.shape[-1] >= _WIDE else product.double(), chunk.shape[2]


Receiver = Callable[[str, Tensor, Iterator[Tensor]], None]


@contextmanager
def inputs_of(
    model: nn.Module,
    layers: Sequence[Site],
    receive: Receiver,
    most: int,
    mask: Tensor | None = None,
) -> Iterator[None]:
    """While it is open, every forward pass hands each layer's input patches to `receive`.

    most: patches of a layer and pass from which on only every so many-th is taken. mask: bool
    [n, tokens], the positions that are no padding; inputs of other leading dimensions are whole.
    """
    by_owner: dict[str, list[Site]] = {}
    for site in layers:
        by_owner.setdefault(site.owner, []).append(site)
    handles = []
    try:
        for owner, own in by_owner.items():
            module = model.get_submodule(owner)
            hook = _hook_for(module)(own, receive, most, mask)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for path, module in model.named_modules():
            inner = f"{path}.out_proj".lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and inner in by_owner:
                hook = _out_proj_hook(inner, receive, most, mask)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


Seen = dict[tuple[str, int], Tensor]


@contextmanager
def inputs_seen(model: nn.Module, owners: Sequence[str]) -> Iterator[Seen]:
    """Fills up, in order of execution, with the first input of each call of these modules; keys are
    (owner, number of the call)."""
    seen: Seen = {}
    calls = dict.fromkeys(owners, 0)

    def hook(owner: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        calls[owner] += 1
        if found and found[0].is_floating_point():
            seen[owner, calls[owner]] = found[0]

    handles = [
        model.get_submodule(owner).register_forward_pre_hook(partial(hook, owner), with_kwargs=True)
        for owner in owners
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hook_for(module: nn.Module) -> Callable[..., Callable[..., None]]:
    if isinstance(module, nn.RNNBase):
        return _recurrent_hook
    return _attention_hook if isinstance(module, nn.MultiheadAttention) else _layer_hook


def _recurrent_hook(
    own: list[Site], receive: Receiver, most: int, mask: Tensor | None
) -> Callable[..., None]:
    wanted = {site.parameter: site.name for site in own}

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        with torch.no_grad():
            for parameter, x in weight_inputs(module, given["input"], given.get("hx")):
                if parameter in wanted:
                    receive(wanted[parameter], x, _rows(x, most, mask))

    return hook


def _layer_hook(
    own: list[Site], receive: Receiver, most: int, mask: Tensor | None
) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = args[0] if args else kwargs["input"]
        given = x if isinstance(module, nn.Linear) else x.new_empty(0)  # windows differ by layer
        receive(own[0].name, given, patches_of(module, x, most, mask))

    return hook


def _attention_hook(
    own: list[Site], receive: Receiver, most: int, mask: Tensor | None
) -> Callable[..., None]:
    """The projections see query, key and value; a joint one, which multiplies all, the three."""

    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        streams = {"q_proj": ["query"], "k_proj": ["key"], "v_proj": ["value"]}
        for site in own:
            names = streams.get(site.parameter.removesuffix("_weight"), ["query", "key", "value"])
            tensors = list({id(given[name]): given[name] for name in names}.values())
            for x in tensors:
                receive(site.name, x, _rows(x, most, mask))

    return hook


def _out_proj_hook(
    name: str, receive: Receiver, most: int, mask: Tensor | None
) -> Callable[..., None]:
    """Attention reads out_proj's weight without calling it: run again with the identity there."""

    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> None:
        twin = copy.copy(module)
        identity = nn.Linear(module.embed_dim, module.embed_dim).to(module.out_proj.weight)
        nn.init.eye_(identity.weight)
        nn.init.zeros_(identity.bias)
        twin._modules = {**module._modules, "out_proj": identity}
        y = type(module).forward(twin, *args, **kwargs)[0]
        receive(name, y, _rows(y, most, mask))

    return hook


def patches_of(
    module: nn.Module, x: Tensor, most: int, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Chunks [groups, width, n] of what the layer's weight rows are multiplied with.

    Of more patches than `most`, every so many-th row of a linear layer, or position of a
    convolution either way.
    """
    if isinstance(module, nn.Linear):
        yield from _rows(x, most, mask)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        yield from _windows(module, x, most)
    else:
        raise TypeError(type(module))


def _rows(x: Tensor, most: int, mask: Tensor | None = None) -> Iterator[Tensor]:
    rows = unpadded(x.detach(), mask)
    rows = rows.reshape(-1, x.shape[-1])
    rows = rows[:: max(1, len(rows) // most)]
    for part in rows.split(max(1, _PATCH_VALUES // max(1, x.shape[-1]))):
        yield part.t()[None]


def _windows(module: nn.Conv1d | nn.Conv2d, x: Tensor, most: int) -> Iterator[Tensor]:
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
    every, axes = _thinning(padded, kernel, stride, dilation, most)
    width = padded.shape[1] * kernel[0] * kernel[1]
    for i, starts in enumerate(itertools.product(*(range(n) for n in axes))):
        own = padded[i::every, :, starts[0] * stride[0] :, starts[1] * stride[1] :]
        if not len(own):
            break
        step = tuple(s * n for s, n in zip(stride, axes, strict=True))
        positions = math.prod(-(-n // s) for n, s in zip(own.shape[2:], step, strict=True))
        for part in own.split(max(1, _PATCH_VALUES // max(1, width * positions))):
            columns = F.unfold(part, kernel, dilation=dilation, stride=step)  # type: ignore[arg-type]
            per_group = columns.shape[1] // module.groups
            yield columns.transpose(0, 1).reshape(module.groups, per_group, -1)


def _thinning(
    padded: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], most: int
) -> tuple[int, tuple[int, ...]]:
    """Of every how many positions one is taken, as a product over the two dimensions.

    Each image starts at another one of them, so that all positions, edges too, count alike.
    """
    sizes = zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    counts = [max(0, (size - d * (k - 1) - 1) // s + 1) for size, k, s, d in sizes]
    spatial = max(1, sum(n > 1 for n in counts))
    every = math.floor((len(padded) * math.prod(counts) / most) ** (1 / spatial) + 0.5)
    axes = tuple(max(1, min(every, n)) for n in counts)
    return math.prod(axes), axes
