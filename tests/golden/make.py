"""Made the golden files of format version 1, once. A new version gets its own; these stay.

The expected codes and scales lie beside them as JSON: a reader is checked, not a round trip.
"""

import json
from pathlib import Path

import torch
from torch import nn

import subbyte as sb

HERE = Path(__file__).parent
METHODS = {
    "words": sb.LowRes(levels=5, granularity="channel", scale_domain="float16"),
    "zstd": sb.LowRes(levels=3, beta=4.0, scale_domain="power_of_two"),
}


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(300, 4))


def main():
    for name, method in METHODS.items():
        torch.manual_seed(1)
        model = network()
        sb.prepare(model, method)
        done = sb.freeze(model)
        path = HERE / f"v1-{name}.safetensors"
        sb.save(sb.pack(done), path, compress=name == "zstd")
        expected = {
            key: {"codes": layer.weight.codes.flatten().tolist(),
                  "scale": layer.weight.scale.tolist(), "bias": layer.bias.tolist()}
            for key, layer in done.layers.items()
        }  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
