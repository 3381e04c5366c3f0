"""The networks of benchmarks/runtime.py: at 3 levels with scales, and as int8 ONNX models."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte as sb
from subbyte.bench.floats import float_twin
from subbyte.models import build

Array = NDArray[Any]
LEVELS, CALIBRATION = 3, 8  # examples, twice


class InvertedResidual(nn.Module):
    """Sandler et al., arXiv:1801.04381, figure 3b and 3d."""

    def __init__(self, before: int, channels: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = before * factor
        self.expand = nn.Sequential(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide))
        deep = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.deep = nn.Sequential(deep, nn.BatchNorm2d(wide))
        self.thin = nn.Sequential(
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.short, self.wide = stride == 1 and before == channels, factor > 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if self.wide else x
        y = self.thin(F.relu6(self.deep(y)))
        return y + x if self.short else y


class MobileNetV2(nn.Module):
    """The same paper, table 2, width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32))
        rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
                (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
        before, blocks = 32, []
        for factor, channels, n, stride in rows:
            for i in range(n):
                blocks.append(InvertedResidual(before, channels, stride if not i else 1, factor))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280))
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.last(self.blocks(F.relu6(self.stem(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class MiniLM(nn.Module):
    """The form of all-MiniLM-L6: 6 layers of width 384 on 128 tokens, its embeddings left out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.ModuleList([_Encoder() for _ in range(6)])
        self.layers = layer

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class _Encoder(nn.Module):
    """Post-norm, GELU, 12 heads, as BERT's layers."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (12, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        x = self.first(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


def resnet18() -> nn.Module:
    from resnet18 import ResNet18

    return ResNet18()


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet18": (resnet18, (3, 224, 224)),
    "mobilenetv1": (lambda: build("mobilenetv1"), (3, 224, 224)),
    "mobilenetv2": (MobileNetV2, (3, 224, 224)),
    "resnet20": (lambda: build("resnet20"), (3, 32, 32)),
    "squeezenet11": (lambda: build("squeezenet11"), (3, 227, 227)),
    "vgg7": (lambda: build("vgg7"), (3, 32, 32)),
    "vit2": (lambda: build("vit2"), (3, 32, 32)),
    "minilm": (MiniLM, (128, 384)),
}


def inputs(name: str, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *NETWORKS[name][1], generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Made:
    """twin: the float network of the packed weights. static: whether the file has scales."""

    twin: nn.Module
    static: bool


def make(name: str, path: Path) -> Made:
    """A network of first weights at 3 levels, with the statistics of random inputs, in a file."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    sb.prepare(model, sb.LowRes(levels=LEVELS))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(inputs(name, 4))
    packed = sb.pack(sb.freeze(model))
    net, scales = sb.fuse(packed), None
    try:
        scales = sb.calibrate_activations(net, [inputs(name, CALIBRATION, s) for s in (1, 2)])
    except sb.SubbyteError as error:
        print(f"  {name}: {error}")
    sb.save(net, path, example=inputs(name, 2), activations=scales)
    return Made(float_twin(packed).eval(), scales is not None)


class _Examples(CalibrationDataReader):  # type: ignore[misc]
    """Two batches of random inputs."""

    def __init__(self, name: str, n: int) -> None:
        self.batches = iter(inputs(name, n, seed).numpy() for seed in (1, 2))

    def get_next(self) -> dict[str, Array] | None:
        x = next(self.batches, None)
        return None if x is None else {"x": x}


def int8_onnx(name: str, twin: nn.Module, n: int) -> bytes:
    """Static QDQ of n examples, a scale per output channel, 7-bit weights (see `peers`)."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(
            twin, (inputs(name, n),), source, input_names=["x"], output_names=["y"],
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        quantize_static(
            source, target, _Examples(name, n), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return target.read_bytes()
