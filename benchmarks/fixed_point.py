"""A packed fixed-point network in integers: the same answers at how many bits of activations?

    .venv/bin/python benchmarks/fixed_point.py \
        runs/experiments/sgm/lenet5-mnist/2-bits-seed0/net.safetensors \
        --data ../shared/data/mnist --images 1000

Runs the first test images through the packed network in float32 and through
`subbyte.graph.integer.integer_network` at several formats, with BatchNorm kept, absorbed, and
absorbed
with power-of-two scales; appends a line to benchmarks/results/fixed-point.jsonl. Slow: int64.
"""

import argparse

import torch
from common import append

from subbyte import storage
from subbyte.data import ImageSet, load_images
from subbyte.graph.integer import integer_network
from subbyte.modules.absorb import absorb_batchnorm

FORMATS = ((4, 8), (6, 10), (8, 16), (12, 24))


@torch.no_grad()
def compare(net: torch.nn.Module, preprocess, data: ImageSet) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Error of the float32 run and of each format, in percent; and where their answers differ."""
    x = preprocess(data.images)
    logits = net(x)
    found: dict[str, object] = {"float32": wrong(logits, data)}
    for fraction, bits in FORMATS:
        run = integer_network(net, fraction=fraction, bits=bits)
        parts = [run(part.double()) for part in x.split(50)]
        integers = torch.cat(parts)
        found[f"{bits} bits, {fraction} behind the point"] = {
            "error": wrong(integers, data),
            "other_answers": int((integers.argmax(1) != logits.argmax(1)).sum()),
            "largest_difference": float((integers - logits.double()).abs().max()),
        }
    return found


def wrong(logits: torch.Tensor, data: ImageSet) -> float:
    return 100.0 * float((logits.argmax(1) != data.labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    net = storage.load(options.file, precision="float32")
    data = load_images(options.data, "test").head(options.images)
    versions = {
        "kept": net,
        "absorbed": absorb_batchnorm(net),
        "powers of two": absorb_batchnorm(net, rounded=True),
    }
    line = {name: compare(v, net.preprocess, data) for name, v in versions.items()}
    append("fixed-point", {"file": options.file, "images": len(data), "batchnorm": line})
    for name, figures in line.items():
        print(f"BatchNorm {name}:")
        for key, value in figures.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
