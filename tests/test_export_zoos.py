"""Networks of transformers and timm, small and of random weights, as ONNX; skipped without them."""

import pytest
import torch

import subbyte as sb
from test_program_zoos import TIMM, TRANSFORMERS, model_of, packed, pixels, timm_net

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'subbyte[export]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'subbyte[export]'")


def check(net, inputs, path):
    """Form small is off by float32 rounding, of sums no longer than 2^10 over 50 layers."""
    made = sb.export(net, path, example=inputs(2), form="small")
    assert made.check.difference <= 50 * 2**10 * 2**-24
    made = sb.export(net, path, example=inputs(2), calibration=[inputs(4)], form="fast")
    assert made.check.difference <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, tmp_path):
    torch.manual_seed(0)
    cls, config, settings, inputs = TRANSFORMERS[name]
    check(packed(model_of(cls, config, **settings)), inputs, tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, tmp_path):
    torch.manual_seed(0)
    size = 32 if name.startswith(("vit", "convnext")) else 64
    net = packed(timm_net(name, **TIMM[name]))
    check(net, pixels(size, "x"), tmp_path / "net.onnx")
