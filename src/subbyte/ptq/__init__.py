"""Post-training quantization: a trained network and some images are enough; no labels needed."""

from subbyte.ptq.plan.ranks import LayerPlan, RankPlan
from subbyte.ptq.published import PublishedCoRa
from subbyte.ptq.quantize import CoRa, Listener, Quantization, quantize

__all__ = [
    "CoRa",
    "LayerPlan",
    "Listener",
    "PublishedCoRa",
    "Quantization",
    "RankPlan",
    "quantize",
]
