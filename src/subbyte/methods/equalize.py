"""Channels rescaled through the BatchNorm behind them, so that one power of two suits them all.

A BatchNorm undoes any positive factor on its input's channels. So the weights of a convolution or
Linear that feeds nothing but a BatchNorm may be multiplied, a channel at a time, by D / s: s the
scale that suits the channel best, D one power of two for the layer. The network computes what it
did (the norm's eps is accounted for); fixed-point methods, which know one scale per layer, start as
close to their levels as others with a scale per channel.

The same idea between layers without norms: Nagel et al., arXiv:1906.04721; through a norm, for a
scale per layer, ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.follow import norms_behind
from subbyte.core.functional import power_of_two, scale_exponent
from subbyte.core.grids import PerChannel, uniform
from subbyte.core.rtn import rtn
from subbyte.core.tensors import as_matrix
from subbyte.errors import SubbyteError


@torch.no_grad()
def equalize(model: nn.Module, x: Tensor, levels: int) -> dict[str, float]:
    """Rescale in place; returns the power of two D of each layer that was rescaled.

    x: one batch of inputs, to find the norms. levels: uniform levels that the weights will have.
    """
    found = {}
    for name, norm_name in norms_behind(model, lambda: model(x)).items():
        layer: Any = model.get_submodule(name)
        norm: Any = model.get_submodule(norm_name)
        matrix = as_matrix(layer.weight)
        if not matrix.abs().amax(1).min() > 0:
            continue  # an all-zero channel has no scale of its own
        scale = rtn(matrix, None, uniform(levels, PerChannel(0))).scale
        step = scale * (2 / (levels - 1))  # distance between two levels: SGM's D
        d = power_of_two(scale_exponent(step.log().mean().exp().reshape(1)))
        factor = d / step
        layer.weight.mul_(factor.reshape([-1] + [1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.mul_(factor)
        norm.running_mean.mul_(factor)
        variance = factor.square() * (norm.running_var + norm.eps) - norm.eps
        norm.running_var.copy_(variance.clamp(min=0.0))
        found[name] = float(d)
    if not found:
        raise SubbyteError(
            "no layer is followed by a BatchNorm of its own, so nothing can be equalized; leave "
            "model.equalize out"
        )
    return found
