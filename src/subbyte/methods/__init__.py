"""How training reaches a grid. A method is one file here and one line in METHODS."""

from typing import Any

from subbyte.methods.base import (
    Method,
    WeightQuantizer,
    after_step,
    float_state_dict,
    freeze,
    frozen_layers,
    penalty,
    prepare,
    quantizers,
    without_quantizers,
)
from subbyte.methods.lowres import LowRes
from subbyte.methods.lsq import LSQ
from subbyte.methods.sgm import SGM
from subbyte.methods.twn import TWN

METHODS: dict[str, type[Any]] = {"lowres": LowRes, "lsq": LSQ, "sgm": SGM, "twn": TWN}
"""Names in a config file -> the frozen dataclass of the method's options."""

__all__ = [
    "LSQ",
    "METHODS",
    "SGM",
    "TWN",
    "LowRes",
    "Method",
    "WeightQuantizer",
    "after_step",
    "float_state_dict",
    "freeze",
    "frozen_layers",
    "penalty",
    "prepare",
    "quantizers",
    "without_quantizers",
]
