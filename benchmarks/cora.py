"""Post-training quantization under several budgets: accuracy, real bits, seconds, a line a run.

    .venv/bin/python benchmarks/cora.py resnet20 --seeds 0 1 2
    .venv/bin/python benchmarks/cora.py mobilenetv1 --seeds 0
    .venv/bin/python benchmarks/cora.py resnet20 --table

Calibrates on images of the training split, drawn with each seed (labels for the published CoRa
only), scores on the whole test split and appends to benchmarks/results/cora.jsonl. `--table` prints
the means of that file. Needs the weights and data that `CASES` names.
"""

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, append
from torch import nn

from subbyte import storage
from subbyte.commands.networks import float_network
from subbyte.commands.quantize import Request, convert
from subbyte.data import ImageSet, batches, load_images
from subbyte.ptq import CoRa, PublishedCoRa
from subbyte.ptq.published import equivalent_bits
from subbyte.train.evaluate import preprocess_of

SHARED = "../shared/data"


@dataclass(frozen=True)
class Case:
    """A trained network and its images."""

    weights: str
    data: str
    score: str
    samples: int


CASES = {
    "resnet20": Case(f"{SHARED}/weights/resnet20_cifar10.safetensors", f"{SHARED}/cifar10",
                     "test", 1600),
    "mobilenetv1": Case(f"{SHARED}/weights/mobilenet_v1_075_imagenet.safetensors",
                        f"{SHARED}/imagenet1000", "validation", 400),
    "squeezenet11": Case(f"{SHARED}/weights/squeezenet11_imagenet.safetensors",
                         f"{SHARED}/imagenet1000", "validation", 400),
    # subbyte train examples/digits-vit1-float.toml --set out=runs/vit1-digits
    "vit1": Case("runs/vit1-digits/weights.safetensors", "digits", "test", 1600),
}  # fmt: skip
METHODS: dict[str, CoRa | PublishedCoRa] = {
    "4.25 bits": CoRa(target_bits=4.25),
    "3.45 bits": CoRa(target_bits=3.45),
    "2.45 bits": CoRa(target_bits=2.45),
    "4 levels": CoRa(levels=4),
    "3 levels": CoRa(levels=3),
    "4 bits": CoRa(bits=4),
    "3 bits": CoRa(bits=3),
    "published, 4 bits": PublishedCoRa(bits=4),
    "published, 3 bits": PublishedCoRa(bits=3),
    "3 levels + adapters, 2.45 bits": CoRa(levels=3, target_bits=2.45),
    "4.25 bits, not tuned": CoRa(target_bits=4.25, tune=0),
    "3.45 bits, not tuned": CoRa(target_bits=3.45, tune=0),
    "2.45 bits, not tuned": CoRa(target_bits=2.45, tune=0),
    "4 bits, not tuned": CoRa(bits=4, tune=0),
    "3 bits, not tuned": CoRa(bits=3, tune=0),
    "4 levels, not tuned": CoRa(levels=4, tune=0),
    "4 levels, neither tuned nor in order": CoRa(levels=4, tune=0, in_order=False),
}


def measure(network: str, name: str, seed: int) -> dict[str, object]:
    case, method = CASES[network], METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            network, case.data, Path(folder) / "net.safetensors", Path(case.weights),
            case.samples, seed, score=case.score,
        )  # fmt: skip
        result = convert(request, method)
        changed = paired(network, case, request.out)
    found = result.to_dict()
    line = {key: found[key] for key in ("layer_bits_per_weight", "bytes", "seconds", "iterations",
                                        "agreement", "top1_float", "top1", "notes")}  # fmt: skip
    line["bits_per_weight"] = line.pop("layer_bits_per_weight")  # as in the lines before
    if isinstance(method, PublishedCoRa):
        line["equivalent_bits"] = equivalent_bits(result.evidence.plan, method)
    levels = [layer.levels for layer in result.evidence.plan.layers]
    ranks = [layer.rank for layer in result.evidence.plan.layers]
    return {"network": network, "method": name, "options": str(method), "seed": seed, **line,
            **changed, "levels": levels, "ranks": ranks}  # fmt: skip


def paired(network: str, case: Case, file: Path) -> dict[str, object]:
    """Of the images that are scored: how many the packed network loses, how many it gains, and the
    95 % interval of the net loss in percent (normal, from the pairs that differ)."""
    images = load_images(case.data, case.score)
    before = right(float_network(network, Path(case.weights), images), images)
    after = right(storage.load(file, precision="float32"), images)
    n, lost, won = len(images), int((before & ~after).sum()), int((after & ~before).sum())
    net, wide = lost - won, 1.96 * math.sqrt(max(0, lost + won - (lost - won) ** 2 / n))
    return {
        "images": n, "right_to_wrong": lost, "wrong_to_right": won,
        "net_loss_percent": [100 * x / n for x in (net, net - wide, net + wide)],
    }  # fmt: skip


@torch.inference_mode()
def right(net: nn.Module, images: ImageSet) -> torch.Tensor:
    """Whether the network names each image's class."""
    preprocess = preprocess_of(net)
    parts = [net(preprocess(x)).argmax(1) == y for x, y in batches(images, 64)]
    return torch.cat(parts)


def table(network: str) -> str:
    """Means over the seeds of the newest run of each (method, seed) with today's options."""
    newest: dict[tuple[str, int], dict[str, float]] = {}
    for text in (RESULTS / "cora.jsonl").read_text().splitlines():
        line = json.loads(text)
        options = str(METHODS.get(line["method"])).replace(", group=None", "")
        current = options == line["options"].replace(", group=None", "")
        if line["network"] == network and current:
            newest[line["method"], line["seed"]] = line
    rows = ["| method | real bits | top-1 %, mean (spread) | each seed | seconds, median |",
            "|---|---|---|---|---|"]  # fmt: skip
    for name in METHODS:
        lines = [line for (method, _), line in sorted(newest.items()) if method == name]
        if not lines:
            continue
        top1 = [line["top1"] for line in lines]
        bits = statistics.median(line["bits_per_weight"] for line in lines)
        seconds = statistics.median(line["seconds"] for line in lines)
        each = ", ".join(f"{value:.2f}" for value in top1)
        rows.append(f"| {name} | {bits:.3f} | {statistics.mean(top1):.2f} "
                    f"({max(top1) - min(top1):.2f}) | {each} | {seconds:.0f} |")  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--table", action="store_true", help="print the results there are, no run")
    options = parser.parse_args()
    if options.table:
        print(table(options.network))
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for name in options.only:
            line = measure(options.network, name, seed)
            append("cora", line)
            print(
                f"{options.network} {name:32} seed {seed}: {line['top1']:.2f} % at "
                f"{line['bits_per_weight']:.3f} bits, {line['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
