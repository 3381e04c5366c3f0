"""What every reference network has: how to build it again, its input, its class count."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.models.preprocess import Preprocess

_MOST = 2**20  # of an argument: what is made for each must not take all memory


@dataclass(frozen=True)
class NetworkSpec:
    """A network's key in `NETWORKS` and the JSON-able arguments that build it again."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Network(nn.Module):
    """Base of the reference networks: float32 [n, c, h, w] -> logits [n, classes].

    The input is what `preprocess` returns. Subclasses are final and pass all three values.
    """

    def __init__(self, spec: NetworkSpec, preprocess: Preprocess, classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = preprocess
        self.classes = classes


def image_spec(name: str, *, in_channels: int, image_size: int, classes: int) -> NetworkSpec:
    """The spec of a network for square images; SubbyteError unless all are integers above 0."""
    arguments = {"in_channels": in_channels, "image_size": image_size, "classes": classes}
    return checked_spec(name, **arguments)


def checked_spec(name: str, **arguments: int) -> NetworkSpec:
    """A spec whose arguments are all integers from 1 to 2^20; SubbyteError names another one."""
    for argument, value in arguments.items():
        if type(value) is int and value > _MOST:
            raise SubbyteError(f"{argument}={value} of network '{name}' is over {_MOST}")
        if type(value) is not int or value < 1:
            raise SubbyteError(
                f"{argument}={value!r:.99} of network '{name}' is not an integer of 1 or more; "
                f"give one, such as {argument}=10."
            )
    return NetworkSpec(name, arguments)


def halved(image_size: int, times: int, network: str) -> int:
    """Side length after `times` 2x2 poolings; SubbyteError if nothing would be left."""
    side = image_size >> times
    if side < 1:
        raise SubbyteError(
            f"image_size={image_size} is too small for network '{network}', which halves it "
            f"{times} times; use {1 << times} or more."
        )
    return side


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, padding: int) -> list[nn.Module]:
    """Convolution without bias, BatchNorm, ReLU: three modules for an nn.Sequential."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def linear_bn_relu(in_features: int, out_features: int) -> list[nn.Module]:
    """Linear layer without bias, BatchNorm, ReLU: three modules for an nn.Sequential."""
    return [
        nn.Linear(in_features, out_features, bias=False),
        nn.BatchNorm1d(out_features),
        nn.ReLU(),
    ]


def glorot_(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases, in place, in every Linear, Conv and attention layer.

    The query, key and value projections of an attention layer count as three matrices.
    """
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            for projection in _projections(layer):
                nn.init.xavier_uniform_(projection)
            _zero_(layer.in_proj_bias)
        elif isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.xavier_uniform_(layer.weight)
            _zero_(layer.bias)


def _projections(layer: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    if layer.in_proj_weight is not None:
        return layer.in_proj_weight.chunk(3)
    return layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight


def _zero_(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
