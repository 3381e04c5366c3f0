"""Flash of two networks for microcontrollers in C source, at 3 levels, beside int8 arrays.

python benchmarks/export_c.py

The networks are those of MLPerf Tiny: ResNet-8 for images of 32x32 and DS-CNN for keywords. The
int8 form is the same network with 255 levels: one byte per weight, the same scales, biases and
kernels; form small has its scales and biases in float16. Bytes are what `size` says of the object
file, compiled with -Os: .text with .rodata.
`arrays` leaves the code out. Appends a JSON line per network, form and compiler to
benchmarks/results/export_c.jsonl.
"""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb

COMPILERS = {
    "x86-64": ["gcc"],
    "ARMv7 Thumb-2": ["arm-linux-gnueabihf-gcc", "-mthumb", "-march=armv7-a", "-mfpu=vfpv3-d16"],
}
RESULTS = Path(__file__).parent / "results" / "export_c.jsonl"


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.a, self.na = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.b, self.nb = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.short = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return F.relu(y + self.short(x))


class ResNet8(nn.Module):
    """MLPerf Tiny, image classification: 77 thousand weights."""

    example = (1, 3, 32, 32)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DSCNN(nn.Module):
    """MLPerf Tiny, keyword spotting: 49 frames of 10 coefficients, 22 thousand weights."""

    example = (1, 1, 49, 10)

    def __init__(self, width=64, blocks=4):
        super().__init__()
        layers = [
            nn.Conv2d(1, width, (10, 4), 2, (5, 1), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for _ in range(blocks):
            layers += [nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU(),
                       nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
                       nn.ReLU()]  # fmt: skip
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 12)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def exported(network, levels, folder, form):
    """The exported .c of a network with random weights, and how many these are."""
    torch.manual_seed(0)
    net = network()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # equal arrays would be stored once
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    n_weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    sb.prepare(net, sb.LowRes(levels=levels))
    path = folder / f"{network.__name__.lower()}_{levels}.c"
    sb.export(sb.pack(sb.freeze(net)), path, example=torch.randn(network.example), form=form)
    return path, n_weights


def sections(path, compiler):
    """Bytes of .text and of .rodata* in the object file."""
    target = path.with_suffix(".o")
    subprocess.run([*compiler, "-std=c99", "-Os", "-c", path, "-o", target], check=True)
    text = subprocess.run(["size", "-A", target], capture_output=True, text=True, check=True).stdout
    found = {"text": 0, "rodata": 0}
    for name, size in re.findall(r"^\.(text|rodata|data\.rel\.ro)\S*\s+(\d+)", text, re.MULTILINE):
        found["text" if name == "text" else "rodata"] += int(size)
    return found


def line(network, target, folder, form):
    rows = {}
    for levels in (3, 255):
        own = form if levels == 3 else "float"
        path, n_weights = exported(network, levels, folder, own)
        arena = int(re.search(r"ARENA_BYTES (\d+)", path.with_suffix(".h").read_text()).group(1))
        rows[levels] = sections(path, COMPILERS[target])
    flash = {k: sum(v.values()) for k, v in rows.items()}
    return {
        "network": network.__name__, "form": form, "target": target, "weights": n_weights,
        "arena_bytes": arena,
        "text": rows[3]["text"], "rodata": rows[3]["rodata"], "int8_text": rows[255]["text"],
        "int8_rodata": rows[255]["rodata"], "flash": round(flash[3] / flash[255], 3),
        "arrays": round(rows[3]["rodata"] / rows[255]["rodata"], 3),
        "arrays_over_weights": round(rows[3]["rodata"] / n_weights, 3),
    }  # fmt: skip


def main():
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a") as out:
        for network in (ResNet8, DSCNN):
            for target, compiler in COMPILERS.items():
                if shutil.which(compiler[0]) is None:
                    continue
                for form in ("float", "small"):
                    found = line(network, target, Path(folder), form)
                    print(json.dumps(found))
                    out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
