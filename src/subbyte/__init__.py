"""subbyte: neural networks at 1 to 4 bits per weight. Train them, convert them, run them.

plan = sb.prepare(model, sb.LowRes(levels=5))     # in place; then train as you always do
done = sb.freeze(model)                           # Quantized: the network, codes and scales
net = sb.pack(done)                               # a new model with packed layers
sb.save(net, "net.safetensors"); net = sb.load("net.safetensors")
sb.export(net, "net.onnx", example=x)             # for other tools
fast = sb.fuse(net)                               # norms, sums and ReLUs done with the products

done = sb.quantize(model, sb.CoRa(bits=3), calibration=batches)      # without training
sb.save(sb.pack(done), "net.safetensors")
"""

from subbyte.core.grids import (
    Grid,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleDomain,
    fixed_point,
    uniform,
)
from subbyte.core.plan import Plan
from subbyte.core.quantized import Quantized
from subbyte.core.recipe import Recipe, Rule
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor
from subbyte.errors import SubbyteError
from subbyte.export import export
from subbyte.graph.fuse import fuse
from subbyte.methods import (
    LSQ,
    SGM,
    TWN,
    LowRes,
    after_step,
    float_state_dict,
    freeze,
    penalty,
    prepare,
)
from subbyte.modules import pack
from subbyte.ptq import (
    CoRa,
    PublishedCoRa,
    calibrate_activations,
    quantize,
    quantize_folder,
)
from subbyte.storage import load, save
from subbyte.tasks import Task, evaluate

__version__ = "0.1.0"

__all__ = [
    "LSQ",
    "SGM",
    "TWN",
    "CoRa",
    "Grid",
    "LowRank",
    "LowRes",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Plan",
    "PublishedCoRa",
    "Quantized",
    "QuantizedLayer",
    "QuantizedTensor",
    "Recipe",
    "Rule",
    "ScaleDomain",
    "SubbyteError",
    "Task",
    "after_step",
    "calibrate_activations",
    "evaluate",
    "export",
    "fixed_point",
    "float_state_dict",
    "freeze",
    "fuse",
    "load",
    "pack",
    "penalty",
    "prepare",
    "quantize",
    "quantize_folder",
    "save",
    "uniform",
]
