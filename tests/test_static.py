"""Activations that stay in 8 bits between layers: calibration, the file, the runtime to the bit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chain
import subbyte as sb
from subbyte import SubbyteError
from subbyte.graph.activations import FUNCTIONS, SAME, ByteScale, flow_of
from subbyte.graph.program import LAYER, Program
from subbyte.graph.trace import trace
from subbyte.models import build
from test_artifact import edit

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

import subbyte.runtime as rt


class Mobile(nn.Module):
    """Depthwise, ReLU6, values with sign, a sum of them; 20 and 40 channels, odd sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 20, 3, 2, 1), nn.Conv2d(20, 40, 1)
        self.deep, self.thin = nn.Conv2d(40, 40, 3, 1, 1, groups=40), nn.Conv2d(40, 20, 1)
        self.down = nn.Conv2d(20, 20, 3, 2, 1, groups=20)
        self.few = nn.Conv2d(20, 12, 3, 1, 1)
        self.last = nn.Conv2d(12, 12, 3, 1, (0, 1), groups=12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = x + self.thin(F.relu6(self.deep(F.relu6(self.wide(x)))))
        x = F.relu6(self.down(x))
        return self.fc(self.last(self.few(x)).mean((2, 3)))


class Fire(nn.Module):
    """Concatenation, groups, pools of both kinds, functions by table, a matrix at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 16, 1)
        self.one, self.three = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 24, 3, padding=1)
        self.groups = nn.Conv2d(48, 32, 3, 1, 2, dilation=2, groups=2)
        self.free = nn.Conv2d(32, 16, (1, 3), (2, 1), (0, 1))
        self.fc, self.head = nn.Linear(16 * 3 * 6, 33), nn.Linear(33, 7)

    def forward(self, x):
        x = F.leaky_relu(self.squeeze(F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)))
        x = torch.cat([F.relu(self.one(x)), self.three(x)], 1)
        x = F.hardswish(F.avg_pool2d(self.groups(x), 3, 1, 1, count_include_pad=False))
        x = F.relu(self.free(F.pad(x[:, :, 1:], (0, 0, 1, 1)))).flatten(1)
        return self.head(F.relu(self.fc(x)))


def packed(net, levels=3, granularity="tensor", fuse=True):
    torch.manual_seed(levels)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3), module.running_var.uniform_(0.5, 2)
    sb.prepare(net, sb.LowRes(levels=levels, granularity=granularity))
    made = sb.pack(sb.freeze(net))
    return sb.fuse(made) if fuse else made


NETWORKS = {
    "resnet": (lambda: build("resnet20"), (3, 32, 32)),
    "mobile": (Mobile, (3, 21, 18)),
    "fire": (Fire, (3, 12, 12)),
}


def images(shape, n=2, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def calibrated(name, path, **settings):
    """A network in a file with scales; its packed module, an input, the scales."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = packed(make(), **settings)
    scales = sb.calibrate_activations(net, [images(shape, 3, seed) for seed in (1, 2)])
    sb.save(net, path, example=images(shape), activations=scales)
    return net, images(shape, 3), scales


# ---------------------------------------------------------------- to the bit


def expected(program, node, net, have):
    """What an operation makes of the values before it; None where it is all in floats."""
    args = node.args

    def value(key):
        own = args.get(key)
        return have[own["value"]] if isinstance(own, dict) and "value" in own else None

    x, to = value("x"), program.activations.get(node.out)
    if node.op == LAYER:
        layer = net.get_submodule(node.layer)
        if isinstance(layer, nn.BatchNorm2d) or (to is None and not isinstance(x, chain.Bytes)):
            return None
        return chain.conv(layer, x, value("plus"), to)
    if node.op == "Concat":
        parts = [chain.same_scale(have[part["value"]], to) for part in args["inputs"]]
        return chain.Bytes(np.concatenate([part.q for part in parts], 1), to)
    if node.op == "Add" and to is not None:
        return chain.add(value("a"), value("b"), to)
    if not isinstance(x, chain.Bytes):
        return None
    if node.op == "AveragePool2d":
        return chain.average(x, args, to)
    if node.op == "ReduceMean":
        return chain.mean(x)
    return moved(node, x) if node.op in SAME else None


def moved(node, x):
    """By PyTorch, on whole numbers."""
    args, q = node.args, torch.from_numpy(x.q)
    if node.op == "MaxPool2d":
        settings = {
            k: args[o]
            for k, o in (("stride", "strides"), ("padding", "pads"), ("ceil_mode", "ceil_mode"))
            if o in args
        }
        found = F.max_pool2d(q.double(), args["kernel_shape"], **settings)
    elif node.op == "Slice":
        cut = [slice(None)] * q.ndim
        end = args.get("end")
        cut[args["axis"]] = slice(args.get("start"), end, args.get("steps", 1))
        found = q[tuple(cut)]
    elif node.op in ("Pad", "ConstantPad"):
        found = F.pad(q, args["pads"])
    else:
        assert node.op in ("Flatten", "Reshape", "ReshapeCopy"), node.op
        found = q.flatten(1)
    return x.like(found.numpy())


def check_bits(path, net, x, scales):
    """Every operation whose inputs or result are bytes; how many of each there are."""
    program, seen, have = scales.program, {}, {}
    program = replace(program, activations=scales.scales)
    opened = rt.open(path, threads=1)
    opened.watch(lambda name, value: seen.update({name: value}), x.numpy())
    have[program.inputs[0].name] = x.numpy()
    checked = []
    for node in program.nodes:
        found = seen.get(node.out)
        if found is None:  # a size
            continue
        wanted = expected(program, node, net, have)
        if found.dtype == np.uint8:
            own = program.activations.get(node.out) or have[node.args["x"]["value"]].scale
            have[node.out] = chain.from_memory(found, own)
        else:
            have[node.out] = found
        if wanted is None:
            assert found.dtype != np.uint8 or node.op in FUNCTIONS, node
            continue
        bits = chain.to_memory(wanted) if isinstance(wanted, chain.Bytes) else wanted
        assert np.array_equal(found, bits), f"{node.op} {node.layer} {node.out}"
        checked.append(node.op)
    assert {n for n in scales.scales if seen[n].dtype != np.uint8} == set()
    return checked


@pytest.mark.parametrize("levels", [3, 5, 4, 17])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_operation_in_bytes_equals_exact_integers(name, levels, tmp_path):
    path = tmp_path / "net.safetensors"
    kind = "channel" if levels == 5 else "tensor"
    net, x, scales = calibrated(name, path, levels=levels, granularity=kind)
    checked = check_bits(path, net, x, scales)
    least = {"resnet": {LAYER, "Slice", "ConstantPad", "ReduceMean"},
             "mobile": {LAYER, "ReduceMean"},
             "fire": {LAYER, "MaxPool2d", "Concat", "AveragePool2d", "Flatten"}}  # fmt: skip
    assert set(checked) >= least[name] - {"ConstantPad"}
    assert checked.count(LAYER) >= 6


def test_functions_are_those_of_their_float_values(tmp_path):
    path = tmp_path / "net.safetensors"
    net, x, scales = calibrated("fire", path)
    program, seen = scales.program, {}
    rt.open(path, threads=1).watch(lambda name, value: seen.update({name: value}), x.numpy())
    done = []
    for node in program.nodes:
        if node.op in ("LeakyRelu", "HardSwish") and seen[node.out].dtype == np.uint8:
            before = chain.from_memory(seen[node.args["x"]["value"]], scales.scales[node.args["x"]["value"]])
            function = {"LeakyRelu": F.leaky_relu, "HardSwish": F.hardswish}[node.op]
            exact = function(torch.from_numpy(before.values()).double()).numpy()
            scale = scales.scales[node.out]
            found = chain.from_memory(seen[node.out], scale).q
            within = np.clip(exact / scale.scale, scale.low, scale.high)
            assert (np.abs(found - within) <= 0.5 + 1e-4).all()
            done.append(node.op)
    assert len(set(done)) == 2


TIER = """
import sys, numpy as np
import subbyte.runtime as rt
net = rt.open(sys.argv[1], threads=int(sys.argv[4]))
np.save(sys.argv[3], net.run(np.load(sys.argv[2])))
"""


@pytest.mark.parametrize("name", list(NETWORKS))
def test_tiers_and_threads_give_the_same_bits(name, tmp_path):
    from subbyte import _native

    path = tmp_path / "net.safetensors"
    _, x, _ = calibrated(name, path, levels=5)
    np.save(tmp_path / "x.npy", x.numpy())
    found = []
    for tier, threads in [(tier, 1) for tier in _native.tiers()] + [(_native.tiers()[0], 3)]:
        out = tmp_path / f"{tier}{threads}.npy"
        files = [str(path), str(tmp_path / "x.npy"), str(out), str(threads)]
        subprocess.run([sys.executable, "-c", TIER, *files], check=True,
                       env={**os.environ, "SUBBYTE_ISA": tier})  # fmt: skip
        found.append(np.load(out))
    assert len(found) >= 2
    assert all(np.array_equal(found[0], other) for other in found[1:])
