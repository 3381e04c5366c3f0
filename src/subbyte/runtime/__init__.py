"""Packed networks without PyTorch: the C++ runtime, with NumPy in and out (docs/runtime.md).

    net = subbyte.runtime.open("net.safetensors")
    y = net.run(x)

This folder needs NumPy alone, and is the package `subbyte_runtime` where PyTorch is not installed.
"""

from .library import SubbyteError
from .network import Network, Precision, StepTime, open

__all__ = ["Network", "Precision", "StepTime", "SubbyteError", "open"]
