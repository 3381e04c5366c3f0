"""What to measure: a packed file with an input of the right size, or Linear layers by shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from subbyte.core.grids import PerChannel, uniform
from subbyte.core.quantized import Quantized
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.errors import SubbyteError
from subbyte.graph.network import PROGRAM
from subbyte.graph.program import Program
from subbyte.kernels import Precision
from subbyte.models import Network
from subbyte.modules import pack

LARGEST = 1 << 31  # weights of a layer to make up


class Shapes(nn.Module):
    """Packed Linear layers of random codes, each on the first features of the input."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], levels: int, precision: Precision
    ) -> None:
        super().__init__()
        layers = [_random_layer(shape, levels, precision) for shape in shapes]
        self.linear = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [n, features of the widest layer]."""
        return [layer(x[:, : layer.in_features].contiguous()) for layer in self.linear]


def from_shapes(
    shapes: Sequence[tuple[int, int]], levels: int, precision: Precision = "auto"
) -> tuple[nn.Module, Tensor]:
    """Linear layers (out, in), and an example that all of them take."""
    net = Shapes(shapes, levels, precision)
    return net, torch.randn(max(k for _, k in shapes))


def _random_layer(shape: tuple[int, int], levels: int, precision: Precision) -> nn.Module:
    if min(shape) < 1 or shape[0] * shape[1] > LARGEST:
        raise SubbyteError(f"shape {shape[0]}x{shape[1]}; use 1 to {LARGEST} weights")
    grid = uniform(levels, PerChannel(0))
    codes = torch.randint(0, grid.n_levels, shape, dtype=torch.uint8)
    weight = QuantizedTensor(codes, torch.rand(shape[0]), grid)
    with torch.device("meta"):
        like = nn.Linear(shape[1], shape[0], bias=False)
    return pack(Quantized(like, {"": QuantizedLayer(weight, None)}), precision=precision)


def from_network(
    net: nn.Module, name: str, size: Sequence[int] | None = None
) -> tuple[nn.Module, Tensor]:
    """A packed network, and an example of its input.

    name: for the error. size: of the input without its batch; by default as the network says.
    Raises SubbyteError if it does not say.
    """
    size = _input_size(net) if size is None else tuple(size)
    if size is None:
        raise SubbyteError(
            f"{name}: network '{_name(net)}' takes images of any size; say which: --input 3,32,32"
        )
    return net, torch.randn(*size)


def _input_size(net: nn.Module) -> tuple[int, ...] | None:
    """Of one example: as the program has it, or as the zoo network takes its images."""
    if isinstance(net, fx.GraphModule) and PROGRAM in net.meta:
        return _program_size(net.meta[PROGRAM])
    if not isinstance(net, Network) or net.preprocess.size is None:
        return None
    return (len(net.preprocess.mean), *net.preprocess.size)


def _program_size(program: Program) -> tuple[int, ...] | None:
    """The size of the one input, if it is float32 and nothing but the batch is open."""
    first = program.inputs[0] if len(program.inputs) == 1 else None
    if first is None or first.dtype != "float32":
        return None
    sizes = tuple(size for size in first.shape[1:] if size is not None)
    return sizes if len(sizes) == len(first.shape) - 1 else None


def _name(net: Any) -> str:
    return net.spec.name if isinstance(net, Network) else type(net).__name__


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "4096x4096,1024x1024" as (out, in) each."""
    shapes = []
    for part in text.split(","):
        sides = part.strip().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise SubbyteError(f"--shapes: '{part}' is no shape; write OUTxIN, such as 4096x4096")
        shapes.append((int(sides[0]), int(sides[1])))
    return shapes


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,8,64" as whole numbers above 0."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SubbyteError(f"{option} {text}: expected whole numbers above 0, such as 1,8,64")
    return tuple(map(int, parts))
