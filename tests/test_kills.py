"""Tests that exist because a planted bug (mutants.toml) survived without them."""

import pytest
import torch
from torch import nn

import subbyte as sb
from nets import Mixed
from subbyte import LowRes, SubbyteError
from test_artifact import edit, packed

DIMENSIONS = {
    nn.Linear: 0,
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
}


@pytest.mark.parametrize("kind", DIMENSIONS, ids=lambda kind: kind.__name__)
def test_a_channels_scale_is_of_the_weights_that_feed_one_output(kind):
    """Which weights those are is read off the gradient, not off the table of axes."""
    n_dims = DIMENSIONS[kind]
    layer = kind(3, 5, 2) if n_dims else kind(3, 5)
    output = layer(torch.rand(1, 3, *[6] * n_dims) + 1)[:, 2].sum()
    (feeds,) = torch.autograd.grad(output, layer.weight)
    sb.prepare(layer, LowRes(levels=5, granularity="channel"))
    before = sb.freeze(layer).layers[""].weight.scale
    with torch.no_grad():
        layer.parametrizations.weight.original[feeds != 0] *= 4
    factors = sb.freeze(layer).layers[""].weight.scale / before
    torch.testing.assert_close(factors, torch.tensor([1.0, 1.0, 4.0, 1.0, 1.0]))


def test_packed_attention_drops_nothing_out_in_eval_mode():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, dropout=0.5)})
    sb.prepare(model, LowRes(levels=5))
    net = sb.pack(sb.freeze(model))
    x = torch.randn(4, 3, 8)
    expected, _ = model.eval()["attn"](x, x, x)
    torch.testing.assert_close(net["attn"](x, x, x)[0], expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_same_padding_stays(mode):
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 5), padding="same", padding_mode=mode))
    sb.prepare(model, LowRes(levels=5))
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(sb.pack(sb.freeze(model))(x), model(x))


def test_a_tensor_that_the_manifest_names_twice_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    sb.save(packed(Mixed()), path)
    edit(path, lambda manifest: manifest["state"].append("conv.bias"))
    with pytest.raises(SubbyteError, match="does not account for every tensor once"):
        sb.load(path, model=Mixed())


def test_a_file_has_the_permissions_of_a_file_written_plainly(tmp_path):
    sb.save(packed(nn.Linear(3, 3)), tmp_path / "net.safetensors")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
