"""Tests that exist because a planted bug (mutants.toml) survived without them."""

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import LowRes

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
    before = sb.freeze(layer)[""].weight.scale
    with torch.no_grad():
        layer.parametrizations.weight.original[feeds != 0] *= 4
    factors = sb.freeze(layer)[""].weight.scale / before
    torch.testing.assert_close(factors, torch.tensor([1.0, 1.0, 4.0, 1.0, 1.0]))
