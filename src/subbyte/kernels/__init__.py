"""How bytes multiply: packed products on the CPU, and why one would not run."""

from subbyte.kernels.calls import conv2d, linear
from subbyte.kernels.panels import panel_bytes
from subbyte.kernels.products import Activation, finish
from subbyte.kernels.served import (
    Precision,
    check_precision,
    is_depthwise,
    tier,
    why_not,
    why_not_conv,
)

__all__ = [
    "Activation",
    "Precision",
    "check_precision",
    "conv2d",
    "finish",
    "is_depthwise",
    "linear",
    "panel_bytes",
    "tier",
    "why_not",
    "why_not_conv",
]
