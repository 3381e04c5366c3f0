"""Made the golden files, each version's once: make.py 1, make.py 2. A version's files stay.

The expected codes and scales lie beside them as JSON: a reader is checked, not a round trip.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import subbyte as sb
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor

HERE = Path(__file__).parent
METHODS = {
    "words": sb.LowRes(levels=5, granularity="channel", scale_domain="float16"),
    "zstd": sb.LowRes(levels=3, beta=4.0, scale_domain="power_of_two"),
}


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(300, 4))


def grouped():
    """Scales per group of inputs, the last of a row shorter: 18 and 300 weights in groups of 16."""
    torch.manual_seed(1)
    model = network()
    grid = sb.uniform(4, sb.PerGroup(16), sb.ScaleDomain.FLOAT16)
    layers = {}
    for name, layer in (("0", model[0]), ("3", model[3])):
        codes = torch.randint(4, layer.weight.shape, dtype=torch.uint8)
        scales = len(codes) * -(-codes[0].numel() // 16)
        scale = (0.5 + torch.rand(scales)).half().float()
        layers[name] = QuantizedLayer(QuantizedTensor(codes, scale, grid), layer.bias.detach())
    return sb.Quantized(model, layers)


def trained(method):
    torch.manual_seed(1)
    model = network()
    sb.prepare(model, method)
    return sb.freeze(model)


def main():
    if sys.argv[1:] == ["1"]:
        made = {f"v1-{name}": trained(method) for name, method in METHODS.items()}
    else:
        made = {"v2-groups": grouped()}
    for name, done in made.items():
        path = HERE / f"{name}.safetensors"
        sb.save(sb.pack(done), path, compress=name.endswith("zstd"))
        expected = {
            key: {"codes": layer.weight.codes.flatten().tolist(),
                  "scale": layer.weight.scale.tolist(), "bias": layer.bias.tolist()}
            for key, layer in done.layers.items()
        }  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
