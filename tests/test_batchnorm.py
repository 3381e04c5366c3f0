"""BatchNorm absorbed into a scale and a shift, against float64; and rounded to powers of two."""

import pytest
import torch
from torch import nn

import subbyte as sb
from nets import Mixed, mixed_input
from oracle import U, assert_within
from subbyte import SGM, SubbyteError
from subbyte.modules.absorb import Affine, absorb_batchnorm

SHAPES = {nn.BatchNorm1d: (6, 5), nn.BatchNorm2d: (3, 5, 4, 2), nn.BatchNorm3d: (2, 5, 3, 2, 2)}


def trained_norm(kind, affine=True, seed=0):
    """A BatchNorm with statistics and parameters as training leaves them, one scale negative."""
    torch.manual_seed(seed)
    norm = kind(5, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 4)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.3, -0.4, 0.02, 2.9, 0.0]))
            norm.bias.normal_()
    return norm.eval()


def exact_affine(norm):
    ones = torch.ones(5)
    weight = (ones if norm.weight is None else norm.weight).double()
    bias = (0 * ones if norm.bias is None else norm.bias).double()
    scale = weight / (norm.running_var.double() + norm.eps).sqrt()
    return scale, bias - scale * norm.running_mean.double()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_an_absorbed_norm_computes_what_it_was(kind, affine):
    norm = trained_norm(kind, affine)
    x = torch.randn(SHAPES[kind])
    scale, shift = (v.reshape([1, 5] + [1] * (x.ndim - 2)).detach() for v in exact_affine(norm))
    got = absorb_batchnorm(norm)(x)
    # scale and shift are rounded once each, the product and the sum once each
    bound = 2 * U * (1 + U) * ((scale * x).abs() + shift.abs()) + U * (scale * x).abs()
    assert_within(got, scale * x.double() + shift, bound)
    assert torch.allclose(got, norm(x), rtol=1e-5, atol=1e-5)


def test_rounded_scales_are_the_nearest_powers_of_two_and_keep_the_mean():
    norm = trained_norm(nn.BatchNorm1d)
    rounded = absorb_batchnorm(norm, rounded=True)
    exact, _ = exact_affine(norm)
    for got, want in zip(rounded.scale.tolist(), exact.tolist(), strict=True):
        if want == 0:
            assert got == 0
            continue
        exponent = torch.tensor(abs(got)).log2().item()
        assert exponent == int(exponent)
        assert (got > 0) == (want > 0)
        assert abs(exponent - torch.tensor(abs(want)).log2().item()) <= 0.5 + 1e-6
    at_mean = rounded(norm.running_mean[None])
    assert torch.allclose(at_mean, norm.bias[None], atol=1e-5)


@pytest.mark.parametrize("mode", ["keep", "absorb", "power_of_two"])
def test_a_packed_network_with_absorbed_norms_is_saved_and_read_back(tmp_path, mode):
    net = Mixed().eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.1, 2)
    sb.prepare(net, SGM(bits=2))
    done = sb.freeze(net)
    packed = sb.pack(done, batchnorm=mode)
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert isinstance(packed.norm, nn.BatchNorm2d if mode == "keep" else Affine)
    assert torch.equal(packed.conv.packed.codes(), done.layers["conv"].weight.codes)
    sb.save(packed, tmp_path / "net.safetensors")
    again = sb.load(tmp_path / "net.safetensors", model=Mixed())
    x = mixed_input()
    assert torch.equal(again(*x), packed(*x))
    if mode == "absorb":
        kept = sb.pack(done)(*x)
        assert torch.allclose(packed(*x), kept, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_used_twice_stays_one():
    norm = trained_norm(nn.BatchNorm1d)
    net = absorb_batchnorm(nn.Sequential(norm, nn.ReLU(), norm))
    assert net[0] is net[2]
    assert isinstance(net[0], Affine)


def test_bad_norms_and_words_are_named():
    with pytest.raises(SubbyteError, match="BatchNorm '1' has no running statistics"):
        absorb_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(SubbyteError, match=r"batchnorm='fold'.*'keep', 'absorb', 'power_of_two'"):
        sb.pack(sb.Quantized(nn.Linear(2, 2), {}), batchnorm="fold")


def test_a_file_that_names_a_norm_the_network_has_not(tmp_path):
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    sb.prepare(net, SGM(bits=2))
    sb.save(sb.pack(sb.freeze(net), batchnorm="absorb"), tmp_path / "net.safetensors")
    other = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    with pytest.raises(SubbyteError, match="no BatchNorm '1'"):
        sb.load(tmp_path / "net.safetensors", model=other)
