"""Post-training quantization: a trained network and some examples are enough; no labels needed."""

from subbyte.ptq.activations import calibrate_activations
from subbyte.ptq.by_block import quantize_folder
from subbyte.ptq.cora import CoRa
from subbyte.ptq.listen import Listener
from subbyte.ptq.published import PublishedCoRa
from subbyte.ptq.quantize import quantize
from subbyte.ptq.solvers import SOLVERS

__all__ = [
    "SOLVERS",
    "CoRa",
    "Listener",
    "PublishedCoRa",
    "calibrate_activations",
    "quantize",
    "quantize_folder",
]
