"""Packed equals trained: for every layer type and level count, after a save and a load."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import subbyte as sb
from nets import Mixed, mixed_input
from oracle import U, assert_within, exact_weight, gamma
from subbyte import LowRes, Recipe, Rule, SubbyteError, kernels
from subbyte.core.sites import CHANNEL_AXIS
from subbyte.packing import radix

LEVELS = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17]
KINDS = [
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]
FUNCTIONS = {k: getattr(F, k) for k in KINDS}
CLASSES = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


@st.composite
def problems(draw, kind):
    """A layer of this kind with odd sizes, an input that fits it, and a method."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    method = LowRes(
        levels=draw(st.sampled_from(LEVELS)),
        granularity=draw(st.sampled_from(["tensor", "channel"])),
        scale_domain=draw(st.sampled_from(["float32", "float16", "power_of_two"])),
        statistic=draw(st.sampled_from(["mean_abs", "std"])),
    )
    bias = draw(st.booleans())
    if kind == "linear":
        n_in, n_out = draw(st.integers(1, 70)), draw(st.integers(1, 20))
        return nn.Linear(n_in, n_out, bias), torch.randn(draw(st.integers(0, 4)), n_in), method
    n_dims = int(kind[-2])
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    multiple = draw(st.integers(1, 2))
    c_in = groups * draw(st.integers(1, 4))  # groups == c_in: depthwise
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(n_dims))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias,
               "padding": draw(st.integers(0, 2))}  # fmt: skip
    if "transpose" in kind:
        options["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    else:
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes if n_dims < 3 else modes[:1]))
    size = tuple(draw(st.integers(6, 9)) for _ in range(n_dims))
    layer = CLASSES[kind](c_in, groups * multiple, kernel, **options)
    return layer, torch.randn(draw(st.integers(1, 3)), c_in, *size), method


def reference(layer, weight, bias, x):
    """The layer's own function with other tensors, all float64."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    kind = next(k for k, c in CLASSES.items() if isinstance(layer, c))
    if "transpose" in kind:
        return FUNCTIONS[kind](x, weight, bias, layer.stride, layer.padding, layer.output_padding,
                               layer.groups, layer.dilation)  # fmt: skip
    padding = layer.padding
    if layer.padding_mode != "zeros":
        amounts = [p for p in reversed(layer.padding) for _ in range(2)]
        x, padding = F.pad(x, amounts, mode=layer.padding_mode), 0
    return FUNCTIONS[kind](x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def fan_in(layer):
    """Longest dot product of the layer."""
    w = layer.weight
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return w.shape[0] // layer.groups * w[0, 0].numel()
    return w[0].numel()


def through_a_file(net, like, compress):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        sb.save(net, path, compress=compress)
        return sb.load(path, model=like, precision="float32")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40)
def test_a_packed_layer_equals_the_trained_one(kind, data):
    layer, x, method = data.draw(problems(kind))
    model = nn.Sequential(layer)
    like = copy.deepcopy(model)
    per_channel = layer.weight.transpose(0, CHANNEL_AXIS[CLASSES[kind]])[0].numel()
    alone = (per_channel if method.granularity == "channel" else layer.weight.numel()) == 1
    assume(not (alone and method.statistic == "std"))  # no spread: refused, see test_methods
    sb.prepare(model, method)
    done = sb.freeze(model)
    layers = done.layers
    net = through_a_file(sb.pack(done, precision="float32"), like, data.draw(st.booleans()))

    frozen, read = layers["0"].weight, net[0].packed.quantized()
    assert read.grid == frozen.grid
    assert torch.equal(read.codes, frozen.codes)
    assert torch.equal(read.scale, frozen.scale)

    weight = exact_weight(frozen)
    bias = None if layer.bias is None else layer.bias.detach().double()
    exact = reference(layer, weight, bias, x.double())
    size = reference(layer, weight.abs(), None if bias is None else bias.abs(), x.double().abs())
    assert_within(net(x), exact, gamma(fan_in(like[0]) + 2) * size)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_packed_embedding_equals_the_trained_one(levels):
    model = nn.Sequential(nn.Embedding(19, 7, padding_idx=3))
    like = copy.deepcopy(model)
    sb.prepare(model, LowRes(levels=levels, granularity="channel"))
    done = sb.freeze(model)
    layers = done.layers
    net = through_a_file(sb.pack(done, precision="float32"), like, levels % 2 == 0)
    indices = torch.randint(0, 19, (4, 5))
    exact = exact_weight(layers["0"].weight)[indices]
    assert_within(net(indices), exact, U * exact.abs())  # one rounding: level times scale
    for bad in (19, -1):
        with pytest.raises(IndexError):
            net(torch.tensor([0, bad]))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_rows_of_a_table_are_unpacked_alone(levels, length):
    codes = torch.randint(0, levels, (9, length), dtype=torch.uint8)
    rows = torch.tensor([8, 0, 3, 3, 7])
    found = radix.unpack_rows(radix.pack(codes, levels), levels, rows, length)
    assert torch.equal(found, codes[rows])
    assert radix.unpack_rows(radix.pack(codes, levels), levels, rows[:0], length).shape == (
        0, length,
    )  # fmt: skip


# ------------------------------------------------------------ attention


def attention_with_bounds(query, key, wq, wk, wv, bias, w_out, b_out, heads, steps=None):
    """Multi-head attention in float64 and a running bound of what float32 may differ by.

    Each step adds its own rounding (gamma_n times the sizes) to what its inputs bring; softmax
    moves by at most exp(2 E) - 1 relatively when its scores move by E. steps: activations of a
    product are rounded to max|x| / steps of a row (docs/kernels.md).
    """

    def linear(x, ex, w, b):
        size = x.abs() @ w.abs().T + b.abs()
        error = ex @ w.abs().T + gamma(w.shape[1] + 2) * (size + ex @ w.abs().T)
        if steps:
            error = error + (x.abs() + ex).amax(-1, keepdim=True) / steps * w.abs().sum(1)
        return x @ w.T + b, error

    def split(t):
        return t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)

    zero = torch.zeros_like
    bq, bk, bv = bias.chunk(3)
    q, eq = (split(t) for t in linear(query, zero(query), wq, bq))
    k, ek = (split(t) for t in linear(key, zero(key), wk, bk))
    v, ev = (split(t) for t in linear(key, zero(key), wv, bv))
    depth = q.shape[-1]
    product, size = q @ k.mT, (q.abs() + eq) @ (k.abs() + ek).mT
    error = size - q.abs() @ k.abs().mT + gamma(depth + 4) * size
    p = (product / depth**0.5).softmax(-1)
    worst = (error / depth**0.5).amax(-1, keepdim=True)
    ep = p * ((2 * worst).exp() * (1 + gamma(2 * key.shape[1] + 16)) - 1)
    o, size = p @ v, (p + ep) @ (v.abs() + ev)
    eo = size - p @ v.abs() + gamma(key.shape[1]) * size
    merge = lambda t: t.transpose(1, 2).flatten(2)  # noqa: E731
    return linear(merge(o), merge(eo), w_out, b_out)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("separate", [False, True])
def test_packed_attention_equals_the_trained_one(levels, separate):
    torch.manual_seed(levels)
    widths = {"kdim": 6, "vdim": 6} if separate else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    model = nn.ModuleDict({"attn": attention})
    like = copy.deepcopy(model)
    sb.prepare(model, LowRes(levels=levels))
    done = sb.freeze(model)
    layers = done.layers
    names = ["q_proj", "k_proj", "v_proj"] if separate else ["in_proj"]
    assert list(layers) == [*(f"attn.{n}" for n in names), "attn.out_proj"]
    net = through_a_file(sb.pack(done, precision="float32"), like, False)
    for name, layer in layers.items():
        packed = net.get_submodule(name)
        weight = getattr(packed, "packed", packed)
        assert torch.equal(weight.quantized().codes, layer.weight.codes)

    query, key = torch.randn(3, 4, 8), torch.randn(3, 5, 6 if separate else 8)
    parts = [exact_weight(layers[f"attn.{n}"].weight) for n in names]
    wq, wk, wv = parts if separate else parts[0].chunk(3)
    w_out = exact_weight(layers["attn.out_proj"].weight)
    exact, bound = attention_with_bounds(
        query.double(), key.double(), wq, wk, wv, attention.in_proj_bias.detach().double(), w_out,
        attention.out_proj.bias.detach().double(), 2,
    )  # fmt: skip
    with torch.no_grad():
        y, _ = net["attn"](query, key, key)
    assert_within(y, exact, bound)


@pytest.mark.parametrize(("precision", "steps"), [("int8", 254), ("int16", 32512)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_plain_self_attention_multiplies_by_the_kernels(precision, steps, batch_first):
    pytest.importorskip("subbyte._native", reason="the C++ core was not built")
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    nn.init.normal_(attention.in_proj_bias)
    model = nn.ModuleDict({"attn": attention})
    sb.prepare(model, LowRes(levels=5))
    done = sb.freeze(model)
    layers = done.layers
    layer = sb.pack(done, precision=precision)["attn"]
    x = torch.randn(3, 4, 8)
    given = x if batch_first else x.transpose(0, 1).contiguous()
    assert layer.why_not(given, given, given, need_weights=False) is None
    y, weights = layer(given, given, given, need_weights=False)
    exact, bound = attention_with_bounds(
        x.double(), x.double(), *exact_weight(layers["attn.in_proj"].weight).chunk(3),
        attention.in_proj_bias.detach().double(), exact_weight(layers["attn.out_proj"].weight),
        attention.out_proj.bias.detach().double(), 2, steps,
    )  # fmt: skip
    assert weights is None
    assert kernels.panel_bytes(layer.in_proj.words) > 0
    assert_within(y if batch_first else y.transpose(0, 1), exact, bound)


def test_attention_says_why_it_decodes_its_weights():
    layer = packed_attention(nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1))
    x = torch.randn(1, 3, 8)
    mask = torch.zeros(3, 3)
    assert "not one tensor" in layer.why_not(x, x.clone(), x, need_weights=False)
    assert "weights are asked for" in layer.why_not(x, x, x)
    assert "masked" in layer.why_not(x, x, x, need_weights=False, attn_mask=mask)
    flat = x[0]
    assert "(3, 8)" in layer.why_not(flat, flat, flat, need_weights=False)
    y = x.double()
    assert "float64" in layer.why_not(y, y, y, need_weights=False)
    assert "dropout" in layer.train().why_not(x, x, x, need_weights=False)
    wide = packed_attention(nn.MultiheadAttention(8, 2, kdim=6, vdim=6))
    assert "projections of their own" in wide.why_not(x, x, x, need_weights=False)
    longer = packed_attention(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert "extended" in longer.why_not(x, x, x, need_weights=False)


def packed_attention(attention):
    model = nn.ModuleDict({"attn": attention})
    sb.prepare(model, LowRes(levels=5))
    return sb.pack(sb.freeze(model))["attn"]


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_attention_takes_every_argument_of_torch(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=True,
                                      add_zero_attn=True)  # fmt: skip
    model = nn.ModuleDict({"attn": attention})
    sb.prepare(model, LowRes(levels=5))
    net = sb.pack(sb.freeze(model), precision="float32")
    x = torch.randn(4, 4, 8)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[:, -1] = True
    for arguments in (
        {},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"key_padding_mask": padding, "average_attn_weights": False},
    ):
        with torch.no_grad():
            expected, got = (
                attention.eval()(x, x, x, **arguments),
                net["attn"](x, x, x, **arguments),
            )
        assert torch.allclose(got[0], expected[0], atol=1e-6)
        assert (got[1] is None) == (expected[1] is None)
        if got[1] is not None:
            assert torch.allclose(got[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("kept", ["attn.in_proj", "attn.out_proj"])
def test_attention_may_keep_one_projection_float(kept):
    model = Mixed()
    sb.prepare(model, Recipe((Rule(kept), Rule(method=LowRes(levels=5)))))
    net = sb.pack(sb.freeze(model), precision="float32")
    x = mixed_input()
    assert torch.allclose(net(*x), model.eval()(*x), atol=1e-6)
    again = through_a_file(net, Mixed(), False)
    assert torch.equal(again(*x), net(*x))


# ------------------------------------------------------------ pack


@pytest.fixture
def packed():
    model = Mixed()
    sb.prepare(model, LowRes(levels=5))
    return sb.pack(sb.freeze(model))


def test_pack_leaves_the_model_alone_and_keeps_no_decoded_weight(packed):
    model = Mixed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prepared = copy.deepcopy(model)
    sb.prepare(prepared, LowRes(levels=5))
    done = sb.Quantized(model, sb.freeze(prepared).layers)  # the float network is as good
    net = sb.pack(done, precision="float32")
    x = mixed_input()
    assert torch.allclose(net(*x), prepared.eval()(*x), atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    held = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    floats = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert held < floats / 4
    assert not any(p.ndim >= 2 for p in net.parameters())


def test_a_packed_model_is_a_plain_module(packed):
    x = mixed_input()
    expected = packed(*x)
    assert torch.equal(copy.deepcopy(packed)(*x), expected)
    other = copy.deepcopy(packed)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(*x), expected)
    torch._dynamo.reset()
    conv = nn.Sequential(packed.conv, packed.norm)
    compiled = torch.compile(conv, fullgraph=True)
    assert torch.allclose(compiled(x[0]), conv(x[0]), atol=1e-5)
    program = torch.export.export(packed, x)
    assert torch.allclose(program.module()(*x), expected, atol=1e-6)


def test_gradients_reach_the_input_of_a_packed_layer():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    sb.prepare(model, LowRes(levels=5))
    net = sb.pack(sb.freeze(model), precision="float32")
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    net(x).square().sum().backward()
    model(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_a_packed_model_runs_in_bf16(packed):
    x, tokens = mixed_input()
    expected = packed(x, tokens)
    got = copy.deepcopy(packed).bfloat16()(x.bfloat16(), tokens)
    assert torch.allclose(got.float(), expected, atol=0.1 * float(expected.abs().max()))


def test_pack_names_what_does_not_fit(packed):
    model = Mixed()
    sb.prepare(model, LowRes(levels=5))
    done = sb.freeze(model)
    layers = done.layers
    with pytest.raises(SubbyteError, match="no layer 'cnv'; it has conv, up"):
        sb.pack(sb.Quantized(Mixed(), {"cnv": layers["conv"]}))
    with pytest.raises(
        SubbyteError, match=r"'head' has shape \(5, 16\), its codes come with \(8, 3, 3, 3\)"
    ):
        sb.pack(sb.Quantized(Mixed(), {"head": layers["conv"]}))
    few = {name: layer for name, layer in layers.items() if name != "head"}
    with pytest.raises(SubbyteError, match="'head' is prepared but not among"):
        sb.pack(sb.Quantized(model, few))
    with pytest.raises(SubbyteError, match="pack takes what freeze and quantize return, not Mixed"):
        sb.pack(model)


def test_an_output_size_that_cannot_be_had_is_named():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2))
    sb.prepare(model, LowRes(levels=3))
    net = sb.pack(sb.freeze(model))
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(net[0](x, output_size=[10, 9]), model[0](x, output_size=[10, 9]))
    with pytest.raises(SubbyteError, match=r"output_size \(12, 9\) cannot be had"):
        net[0](x, output_size=[12, 9])


def test_layers_that_change_themselves_are_refused():
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Loud(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[0] * 10, None

    for layer, says in (
        (Odd(2, 2, 1), r"'0' \(Odd\) cannot be quantized, as .* it overrides Conv2d\.forward"),
        (Standardised(2, 2, 1), r"overrides Conv2d\._conv_forward"),
        (Loud(4, 2), r"'0' \(Loud\).*overrides MultiheadAttention\.forward"),
        (nn.Embedding(3, 2, max_norm=1.0), "its max_norm rewrites"),
    ):
        model = nn.Sequential(layer, nn.Linear(2, 2))
        with pytest.raises(SubbyteError, match=says):
            sb.prepare(model, sb.Recipe((Rule("0", method=LowRes()), Rule(method=LowRes()))))
        before = copy.deepcopy(layer)
        sb.prepare(model, LowRes(levels=3))  # nobody asked for it by name: it stays as it is
        assert all(map(torch.equal, before.parameters(), model[0].parameters()))
        assert not parametrize.is_parametrized(model[0])


def test_what_packing_would_drop_is_refused():
    for change, says in (
        (lambda layer: layer.register_forward_hook(lambda *_: None), "'0' has 1 hooks"),
        (lambda layer: layer.register_buffer("seen", torch.zeros(1)), "it has a seen of its own"),
    ):
        model = nn.Sequential(nn.Linear(3, 2))
        sb.prepare(model, LowRes(levels=3))
        change(model[0])
        with pytest.raises(SubbyteError, match=says):
            sb.pack(sb.freeze(model))


def test_two_packed_models_share_nothing():
    model = nn.Sequential(nn.Linear(3, 2))
    sb.prepare(model, LowRes(levels=3))
    done = sb.freeze(model)
    layers = done.layers
    before = layers["0"].bias.clone()
    for tensor in sb.pack(done).state_dict().values():
        tensor.fill_(7)
    again = sb.pack(done)
    assert torch.equal(again[0].bias, before)
    assert torch.equal(again[0].weight, layers["0"].weight.dequantize())


@pytest.mark.parametrize("rules", [(), (Rule("*.self_attn.*"),), (Rule("*.linear?"),)])
@pytest.mark.parametrize("nested", [False, True])
def test_transformer_encoders_run_packed_with_and_without_a_mask(rules, nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    sb.prepare(model, Recipe((*rules, Rule(method=LowRes(levels=5)))))
    net = sb.pack(sb.freeze(model), precision="float32")
    model.eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad:
            assert torch.allclose(net(x), model(x), atol=1e-5)
            got = net(x, src_key_padding_mask=mask)
            expected = model(x, src_key_padding_mask=mask)
            kept = ~mask[:, : expected.shape[1]]
            assert torch.allclose(got[kept], expected[kept], atol=1e-5)


def test_scales_along_the_inputs_of_a_linear_layer_are_decoded():
    """No method makes them, but layers of one's own may: the kernels scale rows alone."""
    grid = sb.uniform(5, sb.PerChannel(1))
    scale = torch.rand(6) + 0.5
    weight = sb.QuantizedTensor(torch.randint(0, 5, (4, 6), dtype=torch.uint8), scale, grid)
    net = sb.pack(nn.Sequential(nn.Linear(6, 4, bias=False)), {"0": sb.QuantizedLayer(weight)})
    x = torch.randn(3, 6)
    assert "dimension 1" in net[0].why_not(x)
    exact = x.double() @ exact_weight(weight).t()
    assert_within(net(x), exact, gamma(8) * (x.double().abs() @ exact_weight(weight).abs().t()))
