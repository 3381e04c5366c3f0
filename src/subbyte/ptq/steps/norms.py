"""BatchNorm statistics moved by what quantization moved, never estimated anew.

Re-estimating mean and variance on a few plain images harms even the float network (ResNet-20 falls
from 91.73 to 88.93), because training saw other, augmented images. The difference between the
quantized and the float network on the *same* images is free of that:

    mean     := mean + (mean_q - mean_f)
    variance := variance * variance_q / variance_f

layer by layer in the order of execution: each norm is corrected before its output goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.follow import BATCHNORMS
from subbyte.core.quantized import Quantized
from subbyte.core.ready import copied
from subbyte.modules import pack
from subbyte.tasks.batches import Batch, call

_LEAST, _MOST = 0.25, 4.0  # a variance changes at most so far


def has_norms(model: nn.Module) -> bool:
    """Whether there is a BatchNorm with running statistics."""
    return any(_corrects(module) for module in model.modules())


def _corrects(module: nn.Module) -> bool:
    return isinstance(module, BATCHNORMS) and module.running_mean is not None


@torch.no_grad()
def correct_norms(start: Quantized, teacher: nn.Module, images: Batch) -> Quantized:
    """The running statistics moved, the layers as they are.

    teacher: the float network, whose statistics are where they start from. images: one batch; it
    goes through both networks whole.
    """
    before: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(name: str, norm: Any, x: Tensor) -> None:
        before[name] = _moments(x)

    def correct(name: str, norm: Any, x: Tensor) -> None:
        (mean, variance), (old_mean, old_variance) = _moments(x), before[name]
        ratio = variance / old_variance.clamp(min=torch.finfo(torch.float32).tiny)
        start: Any = floats[name]
        norm.running_mean.copy_(start.running_mean + (mean - old_mean))
        norm.running_var.copy_(start.running_var * ratio.clamp(_LEAST, _MOST))

    floats = dict(teacher.named_modules())
    _run(teacher, images, measure)
    model = copied(start.model)
    quantized = pack(replace(start, model=model), precision="float32")
    _run(quantized, images, correct)
    fixed = dict(quantized.named_modules())
    for name, module in model.named_modules():
        if _corrects(module):
            twin: Any = fixed[name]
            module.running_mean.copy_(twin.running_mean)  # type: ignore[union-attr,operator]
            module.running_var.copy_(twin.running_var)  # type: ignore[union-attr,operator]
    return replace(start, model=model)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, variance


def _run(model: nn.Module, images: Batch, visit: Any) -> None:
    """One forward pass; `visit(name, norm, x)` before each norm is applied."""
    handles = []
    for name, module in model.named_modules():
        if _corrects(module):

            def hook(norm: Any, args: Any, name: str = name) -> None:
                visit(name, norm, args[0])

            handles.append(module.register_forward_pre_hook(hook))
    try:
        call(model, images)
    finally:
        for handle in handles:
            handle.remove()
