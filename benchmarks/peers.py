"""Linear layers in other engines, all with the same weights, each in its own 1 to 32 bits.

The weights have 3 levels and a scale a row, which every format here holds exactly; so an engine's
error against float64 is that of its activations, and one that computes garbage is noticed. int8
weights use 7 bits (-64, 0, 64): engines saturate in the products of CPUs without VNNI otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops

Array = NDArray[Any]
BLOCK = 128  # weights that share a scale in the 2- and 4-bit peers
COLD_BYTES = 160 << 20  # of packed weights in a cold pass, five times the largest cache here
MOST_COPIES = 192
SATURATION_FREE = 64  # the largest int8 weight: 2 * 255 * 64 fits in 16 bits


@dataclass(frozen=True, eq=False)
class Problem:
    """x [n, k] times the transpose of scale [rows, 1] * codes [rows, k]; codes are -1, 0 or 1."""

    codes: Array
    scale: Array
    x: Array

    @classmethod
    def random(cls, rows: int, k: int, n: int) -> Problem:
        source = np.random.default_rng(0)
        codes = source.integers(-1, 2, (rows, k), dtype=np.int8)
        scale = source.uniform(0.01, 0.02, rows).astype(np.float32)
        return cls(codes, scale, source.standard_normal((n, k), dtype=np.float32))

    @property
    def weight(self) -> Array:
        return self.codes * self.scale[:, None]

    def exact(self) -> Array:
        exact: Array = self.x.astype(np.float64) @ self.weight.astype(np.float64).T
        return exact

    def copy(self, i: int) -> Problem:
        """Distinct weights of the same shape; the first is this one."""
        return Problem(np.roll(self.codes, i, axis=0), np.roll(self.scale, i), self.x)


@dataclass(frozen=True, eq=False)
class Peer:
    """Something that multiplies: `run` once through all its copies, `result` of the first."""

    name: str
    run: Callable[[], object]
    result: Callable[[], Array]
    copies: int = 1


def copies(bits: float, problem: Problem, cold: bool) -> int:
    """How many layers make a cold pass."""
    size = problem.codes.size * bits / 8
    return min(MOST_COPIES, -int(-COLD_BYTES // size)) if cold else 1


def error(result: Array, exact: Array) -> float:
    """Root mean square of the difference, relative to the exact result's."""
    difference = result.astype(np.float64).reshape(exact.shape) - exact
    return float(np.sqrt((difference**2).mean() / (exact**2).mean()))


def linear_peers(
    problem: Problem, cold: bool, threads: int, only: Sequence[str] = ()
) -> list[Peer]:
    """Every engine with this problem; cold: enough copies to leave the caches."""
    found = []
    for name, (bits, make) in PEERS.items():
        if not only or any(part in name for part in only):
            n = copies(bits, problem, cold)
            found.append(make(name, [problem.copy(i) for i in range(n)], threads))
    return found


# ---------------------------------------------------------------- PyTorch


def torch_float(dtype: torch.dtype) -> Callable[..., Peer]:
    def make(name: str, problems: list[Problem], threads: int) -> Peer:
        layers = [_torch_linear(p).to(dtype) for p in problems]
        x = torch.from_numpy(problems[0].x).to(dtype)
        return _torch_peer(name, layers, x)

    return make


def torch_int8(name: str, problems: list[Problem], threads: int) -> Peer:
    torch.backends.quantized.engine = "fbgemm"

    def layer(p: Problem) -> Callable[..., Any]:
        scale = torch.from_numpy(p.scale).double() / SATURATION_FREE
        zero = torch.zeros(len(scale), dtype=torch.int64)
        weight = torch.quantize_per_channel(torch.from_numpy(p.weight), scale, zero, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)

    return _torch_peer(name, [layer(p) for p in problems], torch.from_numpy(problems[0].x))


def _torch_linear(p: Problem) -> torch.nn.Linear:
    rows, k = p.codes.shape
    layer = torch.nn.Linear(k, rows, bias=False, device="meta").eval()
    layer.weight = torch.nn.Parameter(torch.from_numpy(p.weight), requires_grad=False)
    return layer


def _torch_peer(name: str, layers: Sequence[Callable[..., Any]], x: torch.Tensor) -> Peer:
    def run() -> None:
        for layer in layers:
            layer(x)

    return Peer(name, run, lambda: layers[0](x).float().numpy(), len(layers))


# ---------------------------------------------------------------- ONNX models

Nodes = tuple[list[onnx.NodeProto], dict[str, Array]]  # with the tensors they read


def float_nodes(p: Problem, x: str, y: str) -> Nodes:
    return [helper.make_node("MatMul", [x, f"{y}_w"], [y])], {f"{y}_w": p.weight.T.copy()}


def qdq_nodes(p: Problem, x: str, y: str) -> Nodes:
    """Activations and weights quantized ahead, products to float32."""
    step = np.float32(np.abs(p.x).max() / 127)
    tensors = {
        f"{y}_w": (SATURATION_FREE * p.codes.T).astype(np.int8),
        f"{y}_s": p.scale / SATURATION_FREE,
        f"{y}_z": np.zeros(len(p.scale), np.int8),
        f"{y}_xs": step,
        f"{y}_xz": np.uint8(128),
    }
    own = [f"{y}_xs", f"{y}_xz"]
    nodes = [
        helper.make_node("QuantizeLinear", [x, *own], [f"{y}_q"]),
        helper.make_node("DequantizeLinear", [f"{y}_q", *own], [f"{y}_x"]),
        helper.make_node("DequantizeLinear", [f"{y}_w", f"{y}_s", f"{y}_z"], [f"{y}_dw"], axis=1),
        helper.make_node("MatMul", [f"{y}_x", f"{y}_dw"], [y]),
    ]
    return nodes, tensors


def dynamic_nodes(p: Problem, x: str, y: str) -> Nodes:
    tensors = {
        f"{y}_w": (SATURATION_FREE * p.codes.T).astype(np.int8),
        f"{y}_s": p.scale / SATURATION_FREE,
        f"{y}_z": np.zeros(len(p.scale), np.int8),
    }
    return [
        helper.make_node("DynamicQuantizeMatMul", [x, *tensors], [y], domain="com.microsoft")
    ], tensors


def nbits_nodes(bits: int) -> Callable[[Problem, str, str], Nodes]:
    """Weights of 2 or 4 bits in blocks with a scale each; activations rounded to int8."""

    def nodes(p: Problem, x: str, y: str) -> Nodes:
        rows, k = p.codes.shape
        tensors = {
            f"{y}_w": packed(p.codes + (1 << (bits - 1)), bits).reshape(rows, k // BLOCK, -1),
            f"{y}_s": np.repeat(p.scale, k // BLOCK),
        }
        attributes = {"K": k, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        node = helper.make_node(
            "MatMulNBits", [x, *tensors], [y], domain="com.microsoft", **attributes
        )
        return [node], tensors

    return nodes


def packed(codes: Array, bits: int) -> Array:
    """uint8, the first code in the lowest bits; the last axis is divided by 8 / bits."""
    per_byte = 8 // bits
    parts = (codes.astype(np.uint8) & ((1 << bits) - 1)).reshape(*codes.shape[:-1], -1, per_byte)
    out = np.zeros(parts.shape[:-1], np.uint8)
    for i in range(per_byte):
        out |= parts[..., i] << (bits * i)
    return out


def onnx_model(problems: list[Problem], nodes: Callable[[Problem, str, str], Nodes]) -> bytes:
    """One input, a result for each problem: a pass reads every weight once."""
    every: list[onnx.NodeProto] = []
    tensors: dict[str, Array] = {}
    for i, problem in enumerate(problems):
        made, read = nodes(problem, "x", f"y{i}")
        every += made
        tensors |= read
    n, rows = len(problems[0].x), len(problems[0].codes)
    graph = helper.make_graph(
        every, "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, problems[0].x.shape)],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, (n, rows))
         for i in range(len(problems))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )  # fmt: skip
    return model_of(graph)


def model_of(graph: onnx.GraphProto) -> bytes:
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    data: bytes = helper.make_model(
        graph, opset_imports=versions, ir_version=10
    ).SerializeToString()
    return data


# ---------------------------------------------------------------- ONNX Runtime


def ort_linear(nodes: Callable[[Problem, str, str], Nodes]) -> Callable[..., Peer]:
    def make(name: str, problems: list[Problem], threads: int) -> Peer:
        return ort_peer(name, onnx_model(problems, nodes), problems[0].x, threads, len(problems))

    return make


def ort_peer(name: str, model: bytes, x: Array, threads: int, n_copies: int = 1) -> Peer:
    """Input and outputs bound ahead, so that a run copies nothing.

    The pool does not spin between runs: it would take a core from whoever comes next for up to
    50 ms. Measured alone, an int4 layer of 4096 x 4096 is the faster for it (0.35 ms against 0.9),
    one of 1024 x 1024 the slower (0.06 ms against 0.05).
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, x)
    for output in session.get_outputs():
        value = ort.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32)
        binding.bind_ortvalue_output(output.name, value)
    return Peer(
        name,
        lambda: session.run_with_iobinding(binding),
        lambda: binding.get_outputs()[0].numpy().copy(),
        n_copies,
    )


# ---------------------------------------------------------------- OpenVINO


def openvino_linear(nodes: Callable[[Problem, str, str], Nodes]) -> Callable[..., Peer]:
    def make(name: str, problems: list[Problem], threads: int) -> Peer:
        model = ov.Core().read_model(onnx_model(problems, nodes))
        return openvino_peer(name, model, problems[0].x, threads, len(problems))

    return make


def openvino_int4(name: str, problems: list[Problem], threads: int) -> Peer:
    """Signed nibbles in groups with a scale each; activations rounded to int8 at run time."""
    x = ops.parameter(problems[0].x.shape, np.float32)
    results = [ops.matmul(x, _int4_weight(p), False, True) for p in problems]
    return openvino_peer(name, ov.Model(results, [x]), problems[0].x, threads, len(problems))


def _int4_weight(p: Problem) -> Any:
    rows, k = p.codes.shape
    nibbles = ov.Tensor(ov.Type.i4, ov.Shape([rows, k // BLOCK, BLOCK]))
    nibbles.data[:] = packed(p.codes, 4).reshape(nibbles.data.shape).view(nibbles.data.dtype)
    codes = ops.convert(ov.op.Constant(nibbles), np.float32)
    scale = np.repeat(p.scale, k // BLOCK).reshape(rows, k // BLOCK, 1)
    return ops.reshape(ops.multiply(codes, ops.constant(scale)), np.array([rows, k]), False)


def openvino_peer(name: str, model: Any, x: Array, threads: int, n_copies: int = 1) -> Peer:
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # may be bfloat16 by default
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": BLOCK,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x, shared_memory=True))

    def run() -> None:
        request.start_async()
        request.wait()

    return Peer(name, run, lambda: request.get_output_tensor(0).data.copy(), n_copies)


# name: bits per weight, how to make it
PEERS: dict[str, tuple[float, Callable[..., Peer]]] = {
    "torch float32": (32, torch_float(torch.float32)),
    "torch bfloat16": (16, torch_float(torch.bfloat16)),
    "torch int8 (FBGEMM, dynamic)": (8, torch_int8),
    "ORT float32": (32, ort_linear(float_nodes)),
    "ORT int8 (QDQ)": (8, ort_linear(qdq_nodes)),
    "ORT int8 (dynamic)": (8, ort_linear(dynamic_nodes)),
    "ORT int4 (block 128)": (4.25, ort_linear(nbits_nodes(4))),
    "ORT int2 (block 128)": (2.25, ort_linear(nbits_nodes(2))),
    "OpenVINO float32": (32, openvino_linear(float_nodes)),
    "OpenVINO int8 (QDQ)": (8, openvino_linear(qdq_nodes)),
    "OpenVINO int4 (group 128, dynamic)": (4.25, openvino_int4),
}
