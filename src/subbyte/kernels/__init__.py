"""How bytes multiply: packed products on the CPU, and why one would not run."""

from subbyte.kernels.native import (
    Activation,
    Precision,
    check_precision,
    conv2d,
    finish,
    is_depthwise,
    linear,
    panel_bytes,
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
