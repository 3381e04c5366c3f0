"""Small packed files of every kind: what flips.py and fuzz.py damage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import subbyte as sb
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.models import build


class Images(nn.Sequential):
    """A convolution, a norm, a head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
        )  # fmt: skip


class Words(nn.Module):
    """A table that the head shares, attention, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attend = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 9)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y: Tensor = self.head(self.norm(x + self.attend(x, x, x, need_weights=False)[0]))
        return y


IMAGES, TOKENS = torch.zeros(2, 2, 6, 6), torch.zeros(2, 4, dtype=torch.int64)


def trained(net: nn.Module, levels: int, batchnorm: str = "keep", **options: Any) -> nn.Module:
    sb.prepare(net, sb.LowRes(levels=levels, **options))
    return sb.pack(sb.freeze(net), batchnorm=batchnorm)


def grouped() -> nn.Module:
    """Scales per group of 8 inputs, the last group of a row shorter."""
    net = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 4))
    grid = sb.uniform(4, sb.PerGroup(8), sb.ScaleDomain.FLOAT16)
    layers = {}
    for name, layer in (("0", net[0]), ("2", net[2])):
        codes = torch.randint(4, layer.weight.shape, dtype=torch.uint8)
        scale = torch.ones(len(codes) * -(-codes.shape[1] // 8))
        layers[name] = QuantizedLayer(QuantizedTensor(codes, scale, grid), layer.bias.detach())
    return sb.pack(sb.Quantized(net, layers))


def adapted() -> nn.Module:
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    method = sb.CoRa(levels=3, target_bits=6, tune=0)
    return sb.pack(sb.quantize(net, method, calibration=[torch.randn(40, 24)]))


def shared() -> nn.Module:
    tokens = torch.randint(0, 9, (20, 4))
    return sb.pack(sb.quantize(Words().eval(), sb.CoRa(levels=4, tune=0), calibration=[tokens]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "words": lambda path: sb.save(trained(Images(), 5), path, example=IMAGES),
    "zstd": lambda path: sb.save(
        trained(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), 3, beta=4.0), path,
        example=torch.zeros(2, 64), compress=True,
    ),
    "power of two": lambda path: sb.save(
        trained(Images(), 4, granularity="channel", scale_domain="power_of_two"), path,
        example=IMAGES,
    ),
    "float16": lambda path: sb.save(
        trained(Images(), 17, granularity="channel", scale_domain="float16"), path, example=IMAGES
    ),
    "groups": lambda path: sb.save(grouped(), path, example=torch.zeros(2, 20)),
    "adapter": lambda path: sb.save(adapted(), path, example=torch.zeros(2, 24)),
    "absorbed": lambda path: sb.save(trained(Images(), 3, "absorb"), path, example=IMAGES),
    "shared": lambda path: sb.save(shared(), path, example=TOKENS),
    "zoo": lambda path: sb.save(trained(build("digitsnet"), 3), path),
}  # fmt: skip


def write(name: str, path: Path) -> bytes:
    """The file of one kind, of the same network at each call."""
    torch.manual_seed(0)
    WRITERS[name](path)
    return path.read_bytes()


def files() -> dict[str, bytes]:
    """Of every kind, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: write(name, Path(folder) / "net.safetensors") for name in WRITERS}
