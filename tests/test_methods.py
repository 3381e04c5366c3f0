import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import subbyte as sb
from nets import Mixed, mixed_input
from subbyte import LSQ, SGM, TWN, LowRes, SubbyteError
from subbyte.methods import METHODS, quantizers

METHOD_EXAMPLES = [
    LowRes(levels=3),
    LowRes(levels=5, gamma_grad=True),
    LowRes(levels=4, gamma="frozen", statistic="std"),
    LowRes(levels=9, granularity="channel", scale_domain="float16"),
    LowRes(levels=2, granularity="channel", scale_domain="power_of_two", gamma_grad=True),
    SGM(bits=2, start=1.0, end=10.0),
    TWN(),
    LSQ(bits=3),
]


def train_steps(model, n=3, lr=0.05):
    """A loop that knows nothing of subbyte but the two hooks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(n):
        x, tokens = mixed_input(step)
        optimizer.zero_grad()
        loss = model(x, tokens).square().mean() + sb.penalty(model, step / n)
        loss.backward()
        optimizer.step()
        sb.after_step(model, step / n)
    return loss


def test_every_method_has_an_example():
    assert {type(m) for m in METHOD_EXAMPLES} == set(METHODS.values())


@pytest.mark.parametrize("method", METHOD_EXAMPLES, ids=str)
def test_training_moves_the_float_weights_and_freeze_gives_what_forward_saw(method):
    model = Mixed()
    before = {k: v.clone() for k, v in sb.float_state_dict(sb_prepared(model, method)).items()}
    assert train_steps(model).isfinite()
    after = sb.float_state_dict(model)
    for site, _, _ in quantizers(model):
        key = f"{site.owner}.{site.parameter}"
        assert not torch.equal(before[key], after[key]), f"{key} did not move"
    for site, quantizer, _ in quantizers(model):
        seen = getattr(model.get_submodule(site.owner), site.parameter).detach()
        frozen = sb.freeze(model).layers[site.name].weight
        if quantizer.soft:
            continue  # sees float weights until the end
        # scale * level, where freeze has level * scale: at most a rounding apart
        assert torch.allclose(frozen.dequantize(), seen, rtol=1e-6, atol=0)
        assert seen.unique().numel() <= frozen.grid.n_levels * frozen.scale.numel()


def sb_prepared(model, method):
    sb.prepare(model, method)
    return model


def lowres_by_hand(w, n, beta=1.4):
    """The formulas of docs/methods/ in float64, written out."""
    gamma = beta * w.abs().mean()
    h = (n - 1) / 2
    q = ((w / gamma + 1) * h + 0.5).floor() / h - 1
    return gamma, gamma * q.clamp(-1, 1)


@given(st.integers(2, 17), st.integers(0, 1000))
def test_lowres_follows_its_formulas(n, seed):
    layer = nn.Linear(13, 7)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(7, 13, generator=torch.Generator().manual_seed(seed)))
    w = layer.weight.detach().double()
    gamma, expected = lowres_by_hand(w, n)
    sb.prepare(layer, LowRes(levels=n))
    step = 2 / (n - 1)
    position = (w / gamma + 1) / step + 0.5
    safe = (position - position.round()).abs() > 1e-5  # away from ties float32 must agree
    difference = (layer.weight.double() - expected).abs()
    assert (difference[safe] <= 1e-6 * gamma).all()


def test_the_full_gradient_reaches_the_weights_also_through_the_clamp():
    layer = nn.Linear(50, 20, bias=False)
    sb.prepare(layer, LowRes(levels=3, beta=0.3))  # small beta: most weights are clamped
    g = torch.randn(20, 50)
    layer.weight.backward(g)
    assert torch.equal(layer.parametrizations.weight.original.grad, g)


def test_gamma_gradient_matches_the_formula():
    w = torch.randn(6, 5, dtype=torch.float32)
    layer = nn.Linear(5, 6, bias=False)
    layer.weight.data.copy_(w)
    sb.prepare(layer, LowRes(levels=5, gamma_grad=True))
    g = torch.randn(6, 5)
    layer.weight.backward(g)
    w64, g64 = w.double(), g.double()
    gamma, w_hat = lowres_by_hand(w64, 5)
    # y = gamma q(w / gamma), dq = d(w / gamma): dy = dw + dgamma (q - w / gamma)
    through_gamma = (g64 * (w_hat - w64) / gamma).sum() * 1.4 * w64.sign() / w64.numel()
    expected = g64 + through_gamma
    got = layer.parametrizations.weight.original.grad.double()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_frozen_gamma_stays_and_a_recomputed_one_follows():
    for gamma, factor in (("frozen", 1.0), ("recomputed", 2.0)):
        layer = nn.Linear(8, 8)
        sb.prepare(layer, LowRes(levels=5, gamma=gamma))
        before = sb.freeze(layer).layers[""].weight.scale.item()
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(2)
        assert sb.freeze(layer).layers[""].weight.scale.item() == pytest.approx(
            factor * before, rel=1e-6
        )


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("domain", ["float32", "float16", "power_of_two"])
def test_an_all_zero_layer_works(levels, domain):
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    sb.prepare(layer, LowRes(levels=levels, gamma_grad=True, scale_domain=domain))
    layer(torch.randn(3, 6)).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()
    w = sb.freeze(layer).layers[""].weight.dequantize()
    assert (w.abs() <= 2.0**-126).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_name_the_layer(bad):
    model = Mixed()
    with torch.no_grad():
        model.up.weight[0, 1, 0, 0] = bad
    with pytest.raises(SubbyteError, match="weight of 'up' has 1 NaN or infinite"):
        sb.prepare(model, LowRes())
    assert not hasattr(model.conv, "parametrizations"), "prepare changed the model before it failed"
    model = sb_prepared(Mixed(), LowRes())
    with torch.no_grad():
        model.attn.parametrizations.in_proj_weight.original[0, 0] = bad
    with pytest.raises(SubbyteError, match=r"weight of 'attn\.in_proj' has 1 NaN"):
        sb.freeze(model)


def test_other_misuse_is_named():
    with pytest.raises(SubbyteError, match=r"no quantizers; call prepare"):
        sb.freeze(Mixed())
    with pytest.raises(SubbyteError, match="'conv' already has a parametrization"):
        sb.prepare(sb_prepared(Mixed(), LowRes()), LowRes())
    with pytest.raises(SubbyteError, match=r"'conv' is torch\.bfloat16; call model\.float"):
        sb.prepare(Mixed().bfloat16(), LowRes())
    with pytest.raises(SubbyteError, match="keeps every layer in float"):
        sb.prepare(Mixed(), sb.Recipe((sb.Rule(),)))
    for wrong in (None, LowRes, "lowres"):
        with pytest.raises(SubbyteError, match=r"no method; give a value|keeps every layer"):
            sb.prepare(Mixed(), wrong)
    with pytest.raises(SubbyteError, match="'conv' is on the meta device"):
        sb.prepare(Mixed().to("meta"), LowRes())
    with pytest.raises(SubbyteError, match="weight of '0' is empty"):
        sb.prepare(nn.Sequential(nn.Linear(0, 3)), LowRes())
    pruned = nn.Sequential(nn.Linear(3, 3))
    prune.identity(pruned[0], "weight")
    with pytest.raises(SubbyteError, match=r"'0' .* its weight is computed from other parameters"):
        sb.prepare(pruned, LowRes())
    nan_bias = sb_prepared(nn.Sequential(nn.Linear(3, 3)), LowRes())
    nan_bias[0].bias.data[1] = float("nan")
    with pytest.raises(SubbyteError, match="bias of '0' has NaN"):
        sb.freeze(nan_bias)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(SubbyteError, match="'0' already has a parametrization"):
        sb.prepare(normed, LowRes())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("levels", 1, "levels=1"), ("levels", 300, "levels=300"), ("beta", 0.0, "beta=0.0"),
     ("beta", float("nan"), "beta=nan"), ("gamma", "fixed", "'recomputed', 'frozen'"),
     ("statistic", "max", "'mean_abs', 'std'"), ("granularity", "group", "'tensor', 'channel'"),
     ("scale_domain", "int8", "'float32', 'float16'")],
)  # fmt: skip
def test_lowres_names_bad_options(field, value, says):
    with pytest.raises(SubbyteError, match=says):
        LowRes(**{field: value})


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        (nn.Linear(1, 4), LowRes(statistic="std", granularity="channel")),
        (nn.Linear(4, 4), LowRes(scale_domain="float16")),
    ],
    ids=["one weight a channel has std 0", "float16 underflow"],
)
def test_live_weights_never_vanish_in_silence(layer, method):
    with torch.no_grad():
        layer.weight.mul_(1e-9)
    with pytest.raises(
        SubbyteError, match=r"layer '0': \d+ weights that are not 0 get a scale of 0"
    ):
        sb.prepare(nn.Sequential(layer), method)


# ------------------------------------------------------------ a prepared model is still a model


@pytest.mark.parametrize("method", METHOD_EXAMPLES, ids=str)
def test_a_float_checkpoint_loads_into_a_prepared_model_unchanged(method):
    source, model = Mixed(), Mixed()
    sb.prepare(model, method)
    model.load_state_dict(source.state_dict())  # strict
    for name, value in sb.float_state_dict(model).items():
        assert torch.equal(value, source.state_dict()[name]), name
    fresh = copy.deepcopy(source)
    sb.prepare(fresh, method)  # a frozen gamma must be the one of the loaded weights
    x = mixed_input()
    assert torch.equal(model.eval()(*x), fresh.eval()(*x))
    source.load_state_dict(sb.float_state_dict(model))


@pytest.mark.parametrize("method", METHOD_EXAMPLES, ids=str)
def test_state_dict_deepcopy_and_ema(method):
    model = sb_prepared(Mixed(), method)
    train_steps(model)
    x = mixed_input()
    expected = model.eval()(*x)
    assert torch.equal(copy.deepcopy(model)(*x), expected)
    other = sb_prepared(Mixed(), method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(*x), expected)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    ema.update_parameters(model)
    before = model.head.parametrizations.weight.original.detach().clone()
    train_steps(model.train())
    ema.update_parameters(model)
    after = model.head.parametrizations.weight.original.detach()
    averaged = ema.module.head.parametrizations.weight.original
    assert torch.allclose(averaged, 0.5 * before + 0.5 * after)
    assert set(sb.freeze(ema.module).layers) == set(sb.freeze(model).layers)


@pytest.mark.parametrize("method", METHOD_EXAMPLES, ids=str)
def test_compile_fullgraph_gives_the_same_outputs_and_gradients(method):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    model = sb_prepared(nn.Sequential(*layers), method)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True)(x)
    got.sum().backward()
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_EXAMPLES, ids=str)
def test_export_gives_the_same_outputs(method):
    model = sb_prepared(Mixed(), method).eval()
    x = mixed_input()
    program = torch.export.export(model, x)
    assert torch.allclose(program.module()(*x), model(*x), rtol=1e-5, atol=1e-6)


def test_autocast_and_channels_last_run():
    model = sb_prepared(nn.Sequential(nn.Conv2d(3, 8, 3)), LowRes(levels=5))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("method", METHOD_EXAMPLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_prepared_model_may_be_cast(method, dtype):
    model = sb_prepared(nn.Sequential(nn.Linear(6, 3)), method).to(dtype)
    x = torch.randn(2, 6, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert model[0].parametrizations.weight.original.grad.isfinite().all()


def test_float_checkpoints_load_beside_other_parametrizations():
    class Twice(nn.Module):
        def forward(self, b):
            return 2 * b

    before, after = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(before[0], "bias", Twice())
    sb.prepare(before, LowRes())
    sb.prepare(after, LowRes())
    nn.utils.parametrize.register_parametrization(after[0], "bias", Twice())
    weight = torch.randn(3, 3)
    for model in (before, after):
        missing, unexpected = model.load_state_dict({"0.weight": weight}, strict=False)
        assert missing == ["0.parametrizations.bias.original"]
        assert unexpected == []
        assert torch.equal(sb.float_state_dict(model)["0.weight"], weight)
    plain = sb_prepared(nn.Sequential(nn.Linear(3, 3)), LowRes())
    nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
    plain.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict())


def test_the_transformer_encoder_of_torch_trains_and_packs():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sb.prepare(model, LowRes(levels=5))
    x = torch.randn(2, 5, 16)
    model(x).sum().backward()
    net = sb.pack(sb.freeze(model), precision="float32")
    with torch.no_grad():
        assert torch.allclose(net(x), model.eval()(x), atol=1e-5)
