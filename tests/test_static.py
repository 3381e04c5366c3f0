"""Activations that stay in 8 bits between layers: calibration, the file, the runtime to the bit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
from test_runtime import APART

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

import subbyte.runtime as rt
from subbyte.runtime.library import library


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
        self.fc, self.head = nn.Linear(16 * 4 * 6, 33), nn.Linear(33, 7)

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
    "resnet": (lambda: build("resnet20"), (3, 16, 16)),
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


@pytest.mark.parametrize("levels", [3, 5, 4, 65])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_operation_in_bytes_equals_exact_integers(name, levels, tmp_path):
    path = tmp_path / "net.safetensors"
    kind = "channel" if levels == 5 else "tensor"
    net, x, scales = calibrated(name, path, levels=levels, granularity=kind)
    checked = check_bits(path, net, x, scales)
    least = {"resnet": {LAYER, "Slice", "ReduceMean"},
             "mobile": {LAYER, "ReduceMean"},
             "fire": {LAYER, "MaxPool2d", "Concat", "AveragePool2d", "Slice",
                      "Reshape"}}  # fmt: skip
    assert set(checked) >= least[name]
    assert checked.count(LAYER) >= 6


def test_functions_are_those_of_their_float_values(tmp_path):
    path = tmp_path / "net.safetensors"
    _, x, scales = calibrated("fire", path)
    program, seen = scales.program, {}
    rt.open(path, threads=1).watch(lambda name, value: seen.update({name: value}), x.numpy())
    done = []
    for node in program.nodes:
        if node.op in ("LeakyRelu", "HardSwish") and seen[node.out].dtype == np.uint8:
            before = chain.from_memory(
                seen[node.args["x"]["value"]], scales.scales[node.args["x"]["value"]]
            )
            function = {"LeakyRelu": F.leaky_relu, "HardSwish": F.hardswish}[node.op]
            exact = function(torch.from_numpy(before.values()).double()).numpy()
            scale = scales.scales[node.out]
            found = chain.from_memory(seen[node.out], scale).q
            within = np.clip(exact / scale.scale, scale.low, scale.high)
            assert (np.abs(found - within) <= 0.5 + 1e-4).all()
            done.append(node.op)
    assert len(set(done)) == 2


@pytest.mark.parametrize("name", list(NETWORKS))
def test_tiers_and_threads_give_the_same_bits(name, tmp_path):
    from subbyte import _native

    path = tmp_path / "net.safetensors"
    _, x, _ = calibrated(name, path, levels=5)
    np.save(tmp_path / "x.npy", x.numpy())
    found = []
    for tier, threads in [(tier, 1) for tier in _native.tiers()] + [(_native.tiers()[0], 3)]:
        out = tmp_path / f"{tier}{threads}.npy"
        own = str(Path(rt.__file__).parent)  # without PyTorch
        files = [own, str(path), str(tmp_path / "x.npy"), str(out), str(threads)]
        environment = {**os.environ, "SUBBYTE_ISA": tier, "SUBBYTE_RUNTIME": library()._name}
        subprocess.run([sys.executable, "-c", APART, *files], check=True, env=environment)
        found.append(np.load(out))
    assert len(found) >= 2
    assert all(np.array_equal(found[0], other) for other in found[1:])


# ---------------------------------------------------------------- what runs, and how


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "net.safetensors"
    return path, *calibrated("mobile", path)


def test_profile_says_what_ran_in_what(mobile):
    path, _, x, scales = mobile
    how = {step.out: step.how for step in rt.open(path).profile(x.numpy()) if step.op == LAYER}
    first = next(node.out for node in scales.program.nodes if node.op == LAYER)
    assert how.pop(first) == "int8, to static scales"
    last = scales.program.nodes[-1].out
    assert how.pop(last) == "int8"  # the mean is in float32
    assert set(how.values()) == {"int8, static scales"}


def test_dynamic_rounds_at_each_layer_as_files_without_scales_do(mobile, tmp_path):
    path, net, x, _ = mobile
    bare = tmp_path / "bare.safetensors"
    sb.save(net, bare, example=x)
    wanted = rt.open(bare).run(x.numpy())
    assert np.array_equal(rt.open(path, precision="dynamic").run(x.numpy()), wanted)
    assert np.array_equal(rt.open(bare, precision="dynamic").run(x.numpy()), wanted)
    assert not np.array_equal(rt.open(path).run(x.numpy()), wanted)
    for precision in ("int16", "float32"):  # without rounding to bytes, as before
        other = rt.open(bare, precision=precision).run(x.numpy())
        assert np.array_equal(rt.open(path, precision=precision).run(x.numpy()), other)


def test_the_result_is_close_to_that_of_float_activations(mobile):
    path, _, x, scales = mobile
    exact = rt.open(path, precision="float32").run(x.numpy())
    error = ((rt.open(path).run(x.numpy()) - exact) ** 2).sum() / (exact**2).sum()
    assert error <= 20 * scales.errors[scales.rule] + 1e-3


def test_odd_images_do_not_reach_the_others(mobile):
    path, _, x, _ = mobile
    x = x.clone()
    wanted = rt.open(path).run(x.numpy())
    x[1, 0, 3, 3] = float("nan")
    found = rt.open(path).run(x.numpy())
    assert np.array_equal(found[[0, 2]], wanted[[0, 2]])
    assert found.shape == wanted.shape
    tiny = torch.full_like(x, 1e-39)  # no scale of their own: computed in float32
    zeros = rt.open(path).run(torch.zeros_like(x).numpy())
    assert np.allclose(rt.open(path).run(tiny.numpy()), zeros, atol=1e-5)


# ---------------------------------------------------------------- the file


def test_scales_stay_with_a_network_that_is_loaded_and_saved(mobile, tmp_path):
    path, net, x, scales = mobile
    again = sb.load(path)
    assert again.meta["program"].activations == scales.scales
    with torch.no_grad():
        assert torch.equal(again(x), net(x))  # PyTorch rounds at each layer, as before
    sb.save(again, tmp_path / "again.safetensors")
    assert np.array_equal(
        rt.open(tmp_path / "again.safetensors").run(x.numpy()), rt.open(path).run(x.numpy())
    )


def manifest_of(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["subbyte"])


def test_the_key_is_optional_and_the_version_stays(mobile):
    path, _, _, scales = mobile
    manifest = manifest_of(path)
    assert manifest["version"] == 1
    own = manifest["program"].pop("activations")
    assert {n: ByteScale(s["scale"], s["signed"]) for n, s in own.items()} == scales.scales
    assert Program.from_dict(manifest["program"]) == scales.program
    assert all(np.float32(s.scale) == s.scale for s in scales.scales.values())


HOSTILE = [
    {"n0": {"scale": 0.0, "signed": False}}, {"n0": {"scale": -1.0, "signed": False}},
    {"n0": {"scale": 1e-38, "signed": False}}, {"n0": {"scale": 1e39, "signed": False}},
    {"n0": {"scale": "1", "signed": False}}, {"n0": {"scale": 1.0, "signed": 1}},
    {"n0": {"scale": 1.0}}, {"n0": {"signed": True}}, {"n0": 1.0},
    {"none": {"scale": 1.0, "signed": True}}, ["n0"], 3,
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_hostile_scales_are_refused_by_both_readers(value, mobile, tmp_path):
    broken = tmp_path / "net.safetensors"
    shutil.copy(mobile[0], broken)
    edit(broken, lambda manifest: manifest["program"].update(activations=value))
    for reader in (sb.load, rt.open):
        with pytest.raises(SubbyteError) as found:
            reader(broken)
        assert "\n" not in str(found.value)


def test_scales_of_any_value_are_used_or_left(mobile, tmp_path):
    """A file may have scales for all values, or for few: what has none is float32 in between."""
    path, _, x, _ = mobile
    other = tmp_path / "net.safetensors"
    for keep in (lambda i: i % 2, lambda i: True):
        shutil.copy(path, other)

        def change(manifest, keep=keep):
            names = [node["out"] for node in manifest["program"]["nodes"]]
            one = {"scale": 0.05, "signed": True}
            manifest["program"]["activations"] = {n: one for i, n in enumerate(names) if keep(i)}

        edit(other, change)
        assert np.isfinite(rt.open(other).run(x.numpy())).all()
        sb.load(other)


def test_scales_of_another_program_are_refused(mobile, tmp_path):
    _, _, x, scales = mobile
    net = packed(nn.Sequential(nn.Conv2d(3, 16, 3)), fuse=False)
    with pytest.raises(SubbyteError, match="of another program"):
        sb.save(net, tmp_path / "net.safetensors", example=x, activations=scales)
    assert not (tmp_path / "net.safetensors").exists()


# ---------------------------------------------------------------- calibration


def test_calibration_takes_the_rule_with_the_least_error_on_held_out_examples(mobile):
    scales = mobile[3]
    assert set(scales.errors) == {"largest", "99.99 %", "99.9 %", "least error"}
    assert scales.errors[scales.rule] == min(scales.errors.values())
    assert all(0 < error < 1 for error in scales.errors.values())


def test_values_behind_a_relu_have_no_sign(mobile):
    _, net, _, scales = mobile
    for node in scales.program.nodes:
        if node.op == LAYER and node.out in scales.scales:
            signed = net.get_submodule(node.layer).activation == "none"
            assert scales.scales[node.out].signed == signed


def test_what_cannot_stay_in_bytes_is_refused():
    net = packed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), fuse=False)
    with pytest.raises(SubbyteError, match="no value of the network can stay in 8 bits"):
        sb.calibrate_activations(net, [torch.randn(4, 8)])
    net = packed(Mobile())
    with pytest.raises(SubbyteError, match="NaN or infinite"):
        sb.calibrate_activations(net, [torch.full((2, 3, 21, 18), float("inf"))])


def test_outputs_and_inputs_stay_float(tmp_path):
    """A convolution whose result is the network's is float32 at the end."""
    net = packed(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)))
    program = trace(net, images((3, 8, 8)))
    flow = flow_of(program.nodes, program.layers, program.output)
    assert flow.scaled == {program.nodes[0].out}


def test_lists_of_operators_are_of_operators():
    from subbyte.graph.operators import OPERATORS

    assert set(SAME) | set(FUNCTIONS) <= set(OPERATORS)
