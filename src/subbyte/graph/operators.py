"""The closed list of operators that a program may hold, and what each one runs.

Names follow ONNX where it has the operator, and so do the names of attributes that the two share.
A tensor operator runs one ATen operation; its meaning is that operation's. Layers (packed ones and
norms) are operators of their own kind: they name a module (`LAYERS`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Operator:
    """One tensor operator.

    aten: the operation, "relu.default". renamed: its argument's name -> the name in a program.
    run: what computes it, in place of the operation itself; the same values.
    """

    aten: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    run: Callable[..., Any] | None = None

    @property
    def overload(self) -> Any:
        name, _, overload = self.aten.rpartition(".")
        return getattr(getattr(torch.ops.aten, name), overload)

    @property
    def arguments(self) -> dict[str, str]:
        """Argument's name in a program -> its name in the operation, in its order."""
        skipped = ("layout", "device", "pin_memory", "generator")
        names = [a.name for a in self.overload._schema.arguments if a.name not in skipped]
        return {self.renamed.get(name, name): name for name in names}

    @property
    def required(self) -> tuple[str, ...]:
        """Names in a program of arguments without a default."""
        has = {a.name for a in self.overload._schema.arguments if a.has_default_value()}
        return tuple(ours for ours, theirs in self.arguments.items() if theirs not in has)


def _relu6(x: Tensor, low: float, high: float) -> Tensor:
    return F.relu6(x) if (low, high) == (0, 6) else F.hardtanh(x, low, high)


def _batch_norm(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    momentum: float, epsilon: float,
) -> tuple[Tensor]:  # fmt: skip
    """Of the operation's results the one that inference uses.

    Seven parameters: they are those of the ATen operator.
    """
    return (F.batch_norm(x, mean, var, scale, bias, False, momentum, epsilon),)


_CONV = {"input": "x", "stride": "strides", "padding": "pads", "dilation": "dilations",
         "groups": "group"}  # fmt: skip
_POOL = {"self": "x", "kernel_size": "kernel_shape", "stride": "strides", "padding": "pads",
         "dilation": "dilations", "count_include_pad": "count_include_pad"}  # fmt: skip
_X = {"self": "x", "input": "x"}
_AXIS = {**_X, "dim": "axis"}
_AXES = {**_X, "dim": "axes", "keepdim": "keepdims"}
_TWO = {"self": "a", "other": "b"}

OPERATORS: dict[str, Operator] = {
    # products and windows
    "Linear": Operator("linear.default", _X),
    "MatMul": Operator("matmul.default", _TWO),
    "BatchMatMul": Operator("bmm.default", {"self": "a", "mat2": "b"}),
    "MatMul2d": Operator("mm.default", {"self": "a", "mat2": "b"}),
    "AddMatMul": Operator("addmm.default", {"self": "c", "mat1": "a", "mat2": "b"}),
    "Einsum": Operator("einsum.default"),
    "Conv1d": Operator("conv1d.default", _CONV),
    "Conv2d": Operator("conv2d.default", _CONV),
    "Conv2dSame": Operator("conv2d.padding", _CONV),
    "Conv1dSame": Operator("conv1d.padding", _CONV),
    "Conv3d": Operator("conv3d.default", _CONV),
    "ConvTranspose1d": Operator("conv_transpose1d.default", _CONV),
    "ConvTranspose2d": Operator("conv_transpose2d.input", _CONV),
    "ConvTranspose3d": Operator("conv_transpose3d.input", _CONV),
    "MaxPool1d": Operator("max_pool1d.default", _POOL),
    "MaxPool2d": Operator("max_pool2d.default", _POOL),
    "MaxPool3d": Operator("max_pool3d.default", _POOL),
    "AveragePool1d": Operator("avg_pool1d.default", _POOL),
    "AveragePool2d": Operator("avg_pool2d.default", _POOL),
    "AdaptiveAveragePool1d": Operator("adaptive_avg_pool1d.default", _X),
    "AdaptiveAveragePool2d": Operator("adaptive_avg_pool2d.default", _X),
    "Attention": Operator(
        "scaled_dot_product_attention.default",
        {"query": "Q", "key": "K", "value": "V", "attn_mask": "mask"},
    ),
    # norms
    "BatchNormalization": Operator(
        "_native_batch_norm_legit_no_training.default",
        {**_X, "weight": "scale", "running_mean": "mean", "running_var": "var", "eps": "epsilon"},
        _batch_norm,
    ),
    "LayerNormalization": Operator("layer_norm.default", {**_X, "eps": "epsilon"}),
    "RMSNormalization": Operator("rms_norm.default", {**_X, "eps": "epsilon"}),
    "GroupNormalization": Operator("group_norm.default", {**_X, "eps": "epsilon"}),
    "InstanceNormalization": Operator("instance_norm.default", {**_X, "eps": "epsilon"}),
    # activations
    "Relu": Operator("relu.default", _X, F.relu),
    "Clip": Operator("hardtanh.default", {**_X, "min_val": "min", "max_val": "max"}, _relu6),
    "Clamp": Operator("clamp.default", _X),
    "ClampMin": Operator("clamp_min.default", _X),
    "Gelu": Operator("gelu.default", _X),
    "Sigmoid": Operator("sigmoid.default", _X),
    "Tanh": Operator("tanh.default", _X),
    "Silu": Operator("silu.default", _X),
    "Mish": Operator("mish.default", _X),
    "Elu": Operator("elu.default", _X),
    "LeakyRelu": Operator("leaky_relu.default", {**_X, "negative_slope": "alpha"}),
    "HardSigmoid": Operator("hardsigmoid.default", _X),
    "HardSwish": Operator("hardswish.default", _X),
    "Softplus": Operator("softplus.default", _X),
    "PRelu": Operator("prelu.default", {**_X, "weight": "slope"}),
    "Softmax": Operator("softmax.int", _AXIS),
    "LogSoftmax": Operator("log_softmax.int", _AXIS),
    # arithmetic
    "Add": Operator("add.Tensor", _TWO, torch.add),
    "Sub": Operator("sub.Tensor", _TWO),
    "Mul": Operator("mul.Tensor", _TWO),
    "MulScalar": Operator("mul.Scalar", _TWO),
    "AddScalar": Operator("add.Scalar", _TWO),
    "SubFrom": Operator("rsub.Scalar", _TWO),
    "Div": Operator("div.Tensor", _TWO),
    "Pow": Operator("pow.Tensor_Scalar", {"self": "x"}),
    "PowTensor": Operator("pow.Tensor_Tensor", {"self": "x"}),
    "Neg": Operator("neg.default", _X),
    "Abs": Operator("abs.default", _X),
    "Exp": Operator("exp.default", _X),
    "Log": Operator("log.default", _X),
    "Sqrt": Operator("sqrt.default", _X),
    "ReciprocalSqrt": Operator("rsqrt.default", _X),
    "Reciprocal": Operator("reciprocal.default", _X),
    "Sin": Operator("sin.default", _X),
    "Cos": Operator("cos.default", _X),
    "Erf": Operator("erf.default", _X),
    "Maximum": Operator("maximum.default", _TWO),
    "Minimum": Operator("minimum.default", _TWO),
    # comparisons and masks
    "Equal": Operator("eq.Tensor", _TWO),
    "EqualScalar": Operator("eq.Scalar", _TWO),
    "NotEqualScalar": Operator("ne.Scalar", _TWO),
    "Less": Operator("lt.Tensor", _TWO),
    "LessScalar": Operator("lt.Scalar", _TWO),
    "LessOrEqual": Operator("le.Tensor", _TWO),
    "LessOrEqualScalar": Operator("le.Scalar", _TWO),
    "Greater": Operator("gt.Tensor", _TWO),
    "GreaterScalar": Operator("gt.Scalar", _TWO),
    "GreaterOrEqual": Operator("ge.Tensor", _TWO),
    "GreaterOrEqualScalar": Operator("ge.Scalar", _TWO),
    "And": Operator("logical_and.default", _TWO),
    "Not": Operator("logical_not.default", _X),
    "BitwiseAnd": Operator("bitwise_and.Tensor", _TWO),
    "BitwiseOr": Operator("bitwise_or.Tensor", _TWO),
    "BitwiseNot": Operator("bitwise_not.default", _X),
    "Where": Operator("where.self", {"condition": "condition", "self": "x", "other": "y"}),
    "WhereScalar": Operator("where.ScalarOther", {"self": "x", "other": "y"}),
    "MaskedFill": Operator("masked_fill.Scalar", _X),
    "MaskedFillTensor": Operator("masked_fill.Tensor", _X),
    "Trilu": Operator("tril.default", _X),
    "Triu": Operator("triu.default", _X),
    # reductions
    "ReduceMean": Operator("mean.dim", _AXES),
    "ReduceMeanAll": Operator("mean.default", _X),
    "ReduceSum": Operator("sum.dim_IntList", _AXES),
    "ReduceMax": Operator("amax.default", _AXES),
    "ReduceMin": Operator("amin.default", _AXES),
    "ReduceL2": Operator("linalg_vector_norm.default", _AXES),
    "Variance": Operator("var.correction", _AXES),
    "ReduceAny": Operator("any.dim", _AXIS),
    "ReduceAll": Operator("all.dim", _AXIS),
    "CumSum": Operator("cumsum.default", _AXIS),
    "ArgMax": Operator("argmax.default", _AXIS),
    # shapes
    "Reshape": Operator("view.default", {**_X, "size": "shape"}, torch.reshape),
    "ReshapeCopy": Operator("reshape.default", _X, torch.reshape),
    "Flatten": Operator("flatten.using_ints", _X),
    "Unflatten": Operator("unflatten.int", _AXIS),
    "Transpose": Operator("permute.default", {**_X, "dims": "perm"}),
    "SwapAxes": Operator("transpose.int", _X),
    "MoveAxis": Operator("movedim.int", _X),
    "T": Operator("t.default", _X),
    "Squeeze": Operator("squeeze.dim", _AXIS),
    "SqueezeAxes": Operator("squeeze.dims", _AXES),
    "Unsqueeze": Operator("unsqueeze.default", _AXIS),
    "Expand": Operator("expand.default", {**_X, "size": "shape"}),
    "Tile": Operator("repeat.default", _X),
    "Repeat": Operator("repeat_interleave.self_int", _AXIS),
    "Concat": Operator("cat.default", {"tensors": "inputs", "dim": "axis"}),
    "Stack": Operator("stack.default", {"tensors": "inputs", "dim": "axis"}),
    "Slice": Operator("slice.Tensor", {**_AXIS, "step": "steps"}),
    "Select": Operator("select.int", _AXIS),
    "Gather": Operator("embedding.default", {"weight": "data"}),
    "IndexSelect": Operator("index_select.default", _AXIS),
    "GatherElements": Operator("gather.default", _AXIS),
    "Index": Operator("index.Tensor", _X),
    "Split": Operator("split.Tensor", _AXIS),
    "SplitSizes": Operator("split_with_sizes.default", _AXIS),
    "Chunk": Operator("chunk.default", _AXIS),
    "Unbind": Operator("unbind.int", _AXIS),
    "Pad": Operator("pad.default", {**_X, "pad": "pads"}),
    "ConstantPad": Operator("constant_pad_nd.default", {**_X, "pad": "pads"}),
    "Roll": Operator("roll.default", _X),
    "Flip": Operator("flip.default", {**_X, "dims": "axes"}),
    "PixelShuffle": Operator("pixel_shuffle.default", _X),
    "Unfold": Operator("unfold.default", _X),
    "ResizeNearest": Operator("upsample_nearest2d.vec", _X),
    "ResizeBilinear": Operator("upsample_bilinear2d.vec", _X),
    "ResizeBicubic": Operator("upsample_bicubic2d.vec", _X),
    "ResizeNearest1d": Operator("upsample_nearest1d.vec", _X),
    "ResizeNearest3d": Operator("upsample_nearest3d.vec", _X),
    # copies and types
    "Identity": Operator("clone.default", _X),
    "Contiguous": Operator("contiguous.default", _X),
    "Alias": Operator("alias.default", _X),
    "Dropout": Operator("dropout.default", _X),
    "Cast": Operator("to.dtype", {**_X, "dtype": "to"}),
    "CastCopy": Operator("_to_copy.default", {**_X, "dtype": "to"}),
    "CastLike": Operator("type_as.default", {**_X, "other": "like"}),
    # constants
    "Range": Operator("arange.start_step"),
    "RangeTo": Operator("arange.default"),
    "RangeFrom": Operator("arange.start"),
    "ConstantOfShape": Operator("full.default", {"size": "shape", "fill_value": "value"}),
    "Zeros": Operator("zeros.default", {"size": "shape"}),
    "Ones": Operator("ones.default", {"size": "shape"}),
    "FullLike": Operator("full_like.default", {**_X, "fill_value": "value"}),
    "ZerosLike": Operator("zeros_like.default", _X),
    "OnesLike": Operator("ones_like.default", _X),
    "NewOnes": Operator("new_ones.default", {**_X, "size": "shape"}),
    "NewZeros": Operator("new_zeros.default", {**_X, "size": "shape"}),
    "ScalarTensor": Operator("scalar_tensor.default"),
    # whole numbers from shapes
    "Size": Operator("sym_size.int", _AXIS),
}

NUMBERS: dict[str, Callable[..., Any]] = {  # of the whole numbers a and b that sizes give
    "IntAdd": operator.add,
    "IntSub": operator.sub,
    "IntMul": operator.mul,
    "IntFloorDiv": operator.floordiv,
    "IntNeg": operator.neg,
}
ITEM = "Item"  # element `index` of a list of tensors

_ALIASES = {  # the same operation by another name in ATen -> its entry
    "__and__.Tensor": "BitwiseAnd",
    "__or__.Tensor": "BitwiseOr",
    "max.other": "Maximum",
    "min.other": "Minimum",
}
BY_ATEN: dict[str, str] = {op.aten: name for name, op in OPERATORS.items()} | _ALIASES
