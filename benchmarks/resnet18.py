"""ResNet-18 in PyTorch, packed, and as ONNX models of the same weights for other engines.

He et al., arXiv:1512.03385, table 1: 1.81 billion multiply-adds an image of 3x224x224. Weights are
random, with the batch statistics of random images; what counts is how long it takes, and that every
engine computes the same network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from peers import model_of
from torch import Tensor, nn

import subbyte as sb
from subbyte.bench.floats import float_twin

Array = NDArray[Any]
CLASSES, STAGES = 1000, ((64, 1), (128, 2), (256, 2), (512, 2))


class Block(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution in the shortcut where the shape changes."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down: nn.Module | None = None
        if stride != 1 or before != channels:
            shortcut = nn.Conv2d(before, channels, 1, stride, bias=False)
            self.down = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(y)) + (x if self.down is None else self.down(x)))


class ResNet18(nn.Module):
    """Logits [n, 1000] of images [n, 3, 224, 224]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        before, blocks = 64, []
        for channels, stride in STAGES:
            blocks += [Block(before, channels, stride), Block(channels, channels, 1)]
            before = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu_(self.bn1(self.conv1(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def packed_resnet(levels: int) -> tuple[nn.Module, nn.Module]:
    """All convolutions and the last layer packed, and the float network of the same weights."""
    torch.manual_seed(0)
    model = ResNet18()
    sb.prepare(model, sb.LowRes(levels=levels))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(8))
    net = sb.pack(sb.freeze(model))
    return net, float_twin(net)


def images(n: int, seed: int = 0) -> Tensor:
    x = torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def folded(model: nn.Module) -> nn.Module:
    """BatchNorm folded into the convolutions before it, as deployment tools do for float."""
    fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    model = float_twin(model)
    model.conv1, model.bn1 = fuse(model.conv1, model.bn1), nn.Identity()
    for block in model.blocks:
        block.conv1, block.bn1 = fuse(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fuse(block.conv2, block.bn2), nn.Identity()
        if block.down is not None:
            block.down = fuse(*block.down)
    return model


# ---------------------------------------------------------------- ONNX


class _Graph:
    """Nodes and weights of an ONNX graph as they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, Array] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def weight(self, tensor: Tensor) -> str:
        name = f"w{len(self.tensors)}"
        self.tensors[name] = tensor.detach().contiguous().numpy()
        return name

    def conv(self, x: str, layer: Any) -> str:
        return self.add(
            "Conv", x, self.weight(layer.weight), self.weight(layer.bias),
            kernel_shape=list(layer.kernel_size), strides=list(layer.stride),
            pads=list(layer.padding) * 2,
        )  # fmt: skip


def float_onnx(model: Any, n: int) -> bytes:
    """Of a `folded` network, for n images."""
    graph = _Graph()
    x = graph.add("Relu", graph.conv("x", model.conv1))
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for block in model.blocks:
        y = graph.conv(graph.add("Relu", graph.conv(x, block.conv1)), block.conv2)
        shortcut = x if block.down is None else graph.conv(x, block.down)
        x = graph.add("Relu", graph.add("Add", y, shortcut))
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    weight, bias = graph.weight(model.fc.weight), graph.weight(model.fc.bias)
    graph.nodes.append(helper.make_node("Gemm", [x, weight, bias], ["y"], "fc", transB=1))
    return model_of(
        helper.make_graph(
            graph.nodes, "resnet18",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, (n, 3, 224, 224))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (n, CLASSES))],
            [numpy_helper.from_array(value, name) for name, value in graph.tensors.items()],
        )
    )  # fmt: skip


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Two batches of random images."""

    def __init__(self, n: int) -> None:
        self.batches: Iterator[Array] = iter(_plain(images(n, seed)) for seed in (0, 1))

    def get_next(self) -> dict[str, Array] | None:
        x = next(self.batches, None)
        return None if x is None else {"x": x}


def int8_onnx(model: bytes, n: int) -> bytes:
    """Static QDQ, a scale for each output channel; 7-bit weights, see `peers`."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        quantize_static(
            source, target, _Images(n), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return target.read_bytes()


def _plain(x: Tensor) -> Array:
    """As ONNX models take it: channels first."""
    return np.ascontiguousarray(x.contiguous().numpy())
