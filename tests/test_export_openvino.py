"""OpenVINO files in its CPU plugin, beside the packed network."""

import importlib.util

import pytest
import torch
from torch import nn

import subbyte as sb
from oracle import assert_within
from subbyte import SubbyteError
from subbyte.export import openvino as exporter
from test_program import network

for package in ("openvino", "onnx", "onnxscript", "onnx_ir"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install 'subbyte[openvino]'", allow_module_level=True)

from subbyte.export.through_onnx import build, session  # noqa: E402
from test_export_onnx import (  # noqa: E402
    Request,
    exact,
    exact_parts,
    grid_of,
    in_float32,
    leaves,
    packed_apart,
)


def opened(built, folder):
    for suffix, data in built.files.items():
        (folder / f"net{suffix}").write_bytes(data)
    return session(str(folder / "net.xml"), 1)


def layers():
    cases = [
        (nn.Linear(64, 5), 3, "channel", None), (nn.Linear(64, 5), 4, 16, None),
        (nn.Linear(64, 5), 15, "tensor", torch.int8), (nn.Linear(64, 5), 16, "channel", None),
        (nn.Linear(64, 5), 256, "channel", None), (nn.Linear(64, 5), "uneven", "channel", None),
        (nn.Linear(64, 5), 3, 24, None),
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), 3, "channel", None),
        (nn.Conv2d(4, 6, 3, padding_mode="reflect", padding=1), 5, "tensor", None),
        (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), 4, "tensor", None),
    ]  # fmt: skip
    rows = [(layer, grid_of(levels, per), adapter) for layer, levels, per, adapter in cases]
    inputs = [torch.randn(3, 64) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 6, 5)
              for layer, *_ in rows]  # fmt: skip
    return rows, inputs


def test_layers_of_every_width(tmp_path):
    """Linear layers round their activations, each group of them to 255 steps; the rest is exact."""
    torch.manual_seed(0)
    rows, inputs = layers()
    net = packed_apart(rows)
    built = build(Request(net, "net", "small", tuple(inputs)))
    kinds = dict(built.layers)
    found = opened(built, tmp_path)(inputs)
    for i, (layer, x, y) in enumerate(zip(net.layers, inputs, found, strict=True)):
        wanted, bound = exact(layer, x)
        if isinstance(rows[i][0], nn.Linear):
            off = x.double().abs().amax(-1, keepdim=True).expand_as(x) / 127
            bound = 4 * bound + off @ exact_parts(layer)[1].T
        assert_within(torch.from_numpy(y), wanted, 2 * bound)
    assert [kinds[f"layers.{i}"] for i in range(7)] == [
        "int4", "int4", "int4", "int8", "8-bit codes and a table of levels",
        "8-bit codes and a table of levels", "8-bit codes and a table of levels",
    ]  # fmt: skip


def test_four_bits_a_weight_in_the_file():
    torch.manual_seed(0)
    net = packed_apart([(nn.Linear(400, 500), grid_of(15, "channel"), None)])
    built = build(Request(net, "net", "small", torch.randn(2, 400)))
    assert len(built.files[".bin"]) <= 400 * 500 / 2 + 500 * 4 * 2 + 500


@pytest.mark.parametrize("name", ["unet", "encoder", "mixed", "resnet20"])
def test_networks(name, tmp_path):
    net, inputs = network(name)
    net = in_float32(net)
    torch.manual_seed(1)
    batch = inputs(6)
    built = build(Request(net, "net", "fast", inputs(2), [batch]))
    found = opened(built, tmp_path)(batch)
    with torch.no_grad():
        wanted = [y for y in leaves(net(*batch)) if isinstance(y, torch.Tensor)]
    for y, right in zip(found, wanted, strict=True):
        assert y.shape == right.shape
        assert float((torch.from_numpy(y) - right).abs().max()) <= 0.06 * float(right.abs().max())
    if name == "resnet20":
        assert [stored for _, stored in built.layers].count("int8, int8 products") == 19


def test_export_writes_both_files_and_checks_them(tmp_path):
    net, inputs = network("linear")
    made = sb.export(net, tmp_path / "net.xml", example=inputs(2), form="small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert made.n_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert made.check.runtime.startswith("openvino")
    assert made.check.difference < 0.02


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    from subbyte.export import base

    net, inputs = network("linear")
    monkeypatch.setattr(base, "is_installed", lambda package: package != "openvino")
    with pytest.raises(SubbyteError, match=r"'openvino': pip install 'subbyte\[openvino\]'"):
        sb.export(net, tmp_path / "net.xml", example=inputs(2))
    assert exporter.EXPORTER.extra == "openvino"
