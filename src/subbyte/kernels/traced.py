"""Products that something looks at: autograd, a tracer, a transform of `torch.func`, a mode.

They are calls of the registered operators (`ops`). What an operator of `torch.library` cannot have,
forward derivatives and those of `torch.func`, comes from an `autograd.Function` around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.nn import functional as F

from subbyte.errors import SubbyteError
from subbyte.kernels import products
from subbyte.kernels.ops import conv2d_op, images_gradient, linear_op, plain, tangents_apart
from subbyte.kernels.values import Epilogue, Window
from subbyte.packing import PackedMatrix

_DERIVATIVES = {TransformType.Grad, TransformType.Jvp}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state


def looks_on(x: Tensor) -> bool:
    """Whether something traces, transforms or differentiates calls. Asked at every call."""
    return bool(
        torch.compiler.is_dynamo_compiling()
        or type(x) is not Tensor
        or _tracing() is not None
        or _dispatch_modes()
        or _function_modes()
        or forward_ad._current_level >= 0
        or _transform() is not None
    )


def is_seen(x: Tensor, matrix: PackedMatrix, epilogue: Epilogue) -> bool:
    """Whether a call must go through the operators. Asked at every call."""
    if looks_on(x):
        return True
    if not torch.is_grad_enabled():
        return False
    bias, plus = epilogue.bias, epilogue.plus
    return (
        x.requires_grad
        or matrix.scale.requires_grad
        or (bias is not None and bias.requires_grad)
        or (isinstance(plus, Tensor) and plus.requires_grad)
    )


def linear(x: Tensor, matrix: PackedMatrix, precision: str, epilogue: Epilogue) -> Tensor:
    """`kernels.linear`, by the registered operator."""

    def product(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_op(
            x, matrix.words, matrix.scale, bias, *plain(matrix.grid), list(matrix.shape), precision
        )

    maps = _Maps(
        product,
        lambda x: F.linear(x, matrix.decoded()),
        lambda grad, size: grad @ matrix.decoded(),
    )
    return products.finish(
        _product(x, matrix, epilogue.bias, maps), epilogue.plus, epilogue.activation
    )


def conv2d(
    x: Tensor, matrix: PackedMatrix, window: Window, precision: str, epilogue: Epilogue
) -> Tensor:
    """`kernels.conv2d`, by the registered operator."""

    def product(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv2d_op(
            x, matrix.words, matrix.scale, bias, *plain(matrix.grid), list(matrix.shape),
            window.plain(), precision,
        )  # fmt: skip

    maps = _Maps(
        product,
        lambda x: products.reference_conv2d(x, matrix.decoded(), None, window),
        lambda grad, size: images_gradient(grad, matrix, window, size),
    )
    y = _product(x, matrix, epilogue.bias, maps, (1, 1))
    return products.finish(y, epilogue.plus, epilogue.activation)


@dataclass(frozen=True, slots=True)
class _Maps:
    """A product, and the linear maps that are its derivative."""

    product: Callable[..., Tensor]  # of x and a bias
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Any], Tensor]  # of a gradient and the size of x


def _product(
    x: Tensor, matrix: PackedMatrix, bias: Tensor | None, maps: _Maps, ones: tuple[int, ...] = ()
) -> Tensor:
    """The product with its bias, whatever looks on. ones: the dimensions of y behind its rows."""
    if torch.compiler.is_dynamo_compiling() or not _needs_rules(x, bias):
        return maps.product(x, bias)
    if _is_wrapped(matrix.words) or _is_wrapped(matrix.scale):
        raise SubbyteError(
            "torch.func transforms the weight of a packed layer; only activations can be "
            "transformed: train the float network (subbyte.prepare)"
        )
    y: Tensor = _Differentiable.apply(x, maps)
    return y if bias is None else y + bias.reshape(-1, *ones)


def _needs_rules(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the operator's own rules do not do: for derivatives forwards, or in `torch.func`.

    Raises SubbyteError for derivatives that are functionalized, which PyTorch has no rule for.
    """
    if forward_ad._current_level >= 0:
        return True
    kinds = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    watched = x.requires_grad or (bias is not None and bias.requires_grad)
    wanted = bool(kinds & _DERIVATIVES) or (bool(kinds) and torch.is_grad_enabled() and watched)
    if wanted and TransformType.Functionalize in kinds:
        raise SubbyteError(
            "torch.func.functionalize around a derivative of a packed layer; leave it out: packed "
            "layers change nothing in place"
        )
    return wanted


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class _Differentiable(torch.autograd.Function):
    """A product with derivatives of both kinds, to the activations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, maps: _Maps) -> Tensor:
        with tangents_apart():
            return maps.product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.maps = inputs
        ctx.size = x.shape

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: None) -> Tensor | None:
        return None if tangent is None else ctx.maps.forward(tangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.maps.backward(grad, ctx.size), None
