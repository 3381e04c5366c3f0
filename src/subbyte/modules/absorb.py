"""BatchNorm at inference as one scale and one shift a channel, and those scales as powers of two.

    y = gamma (x - mean) / sqrt(variance + eps) + beta  =  scale x + shift

Codes are untouched. Rounding a scale to a power of two keeps the output at the channel's mean:
shift = beta - scale' mean. A network whose weights, too, have power-of-two scales then needs
shifts and additions only.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from subbyte.core.follow import BATCHNORMS
from subbyte.core.functional import power_of_two, scale_exponent
from subbyte.errors import SubbyteError

BatchNormMode = Literal["keep", "absorb", "power_of_two"]


class Affine(nn.Module):
    """`scale * x + shift` a channel; x [batch, channels, ...]. What a BatchNorm becomes.

    scale, shift: float32 [channels].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))

    def extra_repr(self) -> str:
        return f"channels={self.scale.numel()}"


def absorb_batchnorm(net: nn.Module, *, rounded: bool = False) -> nn.Module:
    """A copy of a network in which every BatchNorm1d, 2d and 3d is an `Affine`; in eval mode.

    rounded: scales become the nearest powers of two (in log2), signs kept. Raises SubbyteError for
    a BatchNorm without running statistics: at inference it depends on the batch.
    """
    net = copy.deepcopy(net)
    if isinstance(net, BATCHNORMS):
        return as_affine("", net, rounded)
    made: dict[int, Affine] = {}
    for path, parent in list(net.named_modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, BATCHNORMS):
                if id(child) not in made:
                    made[id(child)] = as_affine(f"{path}.{name}".lstrip("."), child, rounded)
                setattr(parent, name, made[id(child)])
    return net.eval()


@torch.no_grad()
def as_affine(
    name: str, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, rounded: bool = False
) -> Affine:
    """What a norm does in eval mode; in float64, so that the only rounding is the last.

    name: for the error, SubbyteError, of a norm without running statistics, or of a subclass with
    a forward of its own, which would be lost (an activation inside the norm).
    """
    if type(norm).forward is not nn.BatchNorm2d.forward:
        raise SubbyteError(
            f"BatchNorm '{name}' is a {type(norm).__name__} with a forward of its own, which an "
            "Affine would not run; keep it (batchnorm='keep')"
        )
    if norm.running_mean is None or norm.running_var is None:
        raise SubbyteError(
            f"BatchNorm '{name}' has no running statistics, so it has no fixed scale to absorb; "
            "keep it (batchnorm='keep')"
        )
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    scale = gamma / (variance + norm.eps).sqrt()
    if rounded:
        nearest = power_of_two(scale_exponent(scale.abs())).double()
        scale = torch.where(scale == 0, scale, nearest.copysign(scale))
    return Affine(scale.float(), (beta - scale * mean).float()).train(norm.training)


def check_mode(mode: str) -> None:
    """Raises SubbyteError for a word that is no BatchNormMode."""
    if mode not in get_args(BatchNormMode):
        raise SubbyteError(
            f"batchnorm={mode!r}: expected one of {', '.join(map(repr, get_args(BatchNormMode)))}"
        )


def restore(net: nn.Module, names: tuple[str, ...]) -> None:
    """Put an empty `Affine` in place of each named BatchNorm, in place, to be filled from a file.

    Raises SubbyteError for a name that is no BatchNorm of the network.
    """
    modules = dict(net.named_modules())
    for name in names:
        norm = modules.get(name)
        if not isinstance(norm, BATCHNORMS):
            raise SubbyteError(f"the network has no BatchNorm '{name}'")
        parent, _, own = name.rpartition(".")
        empty = torch.empty(norm.num_features, device="meta")
        setattr(modules[parent], own, Affine(empty, empty.clone()).train(norm.training))
