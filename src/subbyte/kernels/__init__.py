"""How bytes multiply: packed products on the CPU, and why one would not run."""

from subbyte.kernels.calls import conv2d, linear
from subbyte.kernels.panels import panel_bytes
from subbyte.kernels.products import finish, pixels
from subbyte.kernels.ready import Ready, answer, make_ready
from subbyte.kernels.served import (
    Precision,
    check_precision,
    decodes,
    is_depthwise,
    tier,
    why_not,
    why_not_conv,
)
from subbyte.kernels.values import Activation, Epilogue, Window, plain_bias

__all__ = [
    "Activation",
    "Epilogue",
    "Precision",
    "Ready",
    "Window",
    "answer",
    "check_precision",
    "conv2d",
    "decodes",
    "finish",
    "is_depthwise",
    "linear",
    "make_ready",
    "panel_bytes",
    "pixels",
    "plain_bias",
    "tier",
    "why_not",
    "why_not_conv",
]
