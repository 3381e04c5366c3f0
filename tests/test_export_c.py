"""C source: compiled, sanitized, run; each value compared with float64 under a derived bound."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from c_programs import ARM, ARM_GCC, GCC, STRICT, compiled, missing
from nets import Mixed, mixed_input
from oracle import U, gamma
from subbyte import SubbyteError
from subbyte.core.grids import Grid, PerChannel, PerGroup, ScaleDomain, digits_per, uniform
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor
from subbyte.export.base import Request
from subbyte.export.c.arena import plan
from subbyte.export.c.listing import ARENA, Buffer, Step, View, literal
from subbyte.export.c.moves import MOVES
from subbyte.export.c.values import argument, run_node
from subbyte.export.c.words import WIDTHS, best_width, from_words, to_words
from subbyte.export.c.write import float_files, identifier, read_fused
from subbyte.graph.integer import integer_network
from subbyte.models import NETWORKS, build
from subbyte.modules import PACKED, PackedMultiheadAttention

needs_gcc = pytest.mark.skipif(missing(GCC) is not None, reason=str(missing(GCC)))
needs_arm = pytest.mark.skipif(missing(ARM_GCC, ARM) is not None, reason=str(missing(ARM_GCC, ARM)))


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 9, 15, 16, 17, 100, 255, 256])
def test_words_hold_every_code(n, width):
    generator = np.random.default_rng(n)
    codes = generator.integers(0, n, 1001).astype(np.uint8)
    codes[:40], codes[40:80] = n - 1, 0
    words = to_words(codes, n, width)
    assert int(words.max()) < 2**width
    assert words.size == -(-codes.size // digits_per(n, width))
    assert (from_words(words, n, width)[: codes.size] == codes).all()


def test_every_word_of_a_byte_decodes():
    for n in range(2, 17):
        digits = digits_per(n, 8)
        value = np.arange(n**digits)
        codes = np.stack([value // n**k % n for k in reversed(range(digits))], 1).astype(np.uint8)
        assert (from_words(to_words(codes.reshape(-1), n, 8), n, 8) == codes.reshape(-1)).all()


def test_the_narrowest_width_of_the_smallest():
    assert best_width([(1000, 3)]) == 8  # 1.6 bits in any width
    assert best_width([(1000, 9)]) == 16
    assert best_width([(1000, 5)]) == 32


# ---------------------------------------------------------------- arena


def test_the_arena_reuses_and_writes_in_place():
    buffers = [Buffer(ARENA, n) for n in (100, 60, 60, 100)]
    a, b, c, d = (View(k, (x.size,)) for k, x in enumerate(buffers))
    steps = [
        Step("f", (), a, ()), Step("f", (), b, (a,)), Step("f", (), c, (b,), (b,)),
        Step("f", (), d, (c,)),
    ]  # fmt: skip
    placed = plan(buffers, steps, ())
    assert placed.size == 160  # a and d share a place, b and c share one
    assert placed.offsets[1] == placed.offsets[2]
    assert placed.offsets[0] == placed.offsets[3] == 0


def test_what_is_read_later_is_not_written_over():
    buffers = [Buffer(ARENA, 10) for _ in range(3)]
    a, b, c = (View(k, (10,)) for k in range(3))
    steps = [Step("f", (), a, ()), Step("f", (), b, (a,), (a,)), Step("f", (), c, (a, b), (b,))]
    placed = plan(buffers, steps, ())
    assert placed.offsets[0] != placed.offsets[1]
    assert placed.size == 20


# ---------------------------------------------------------------- each value against float64


def norms_at_random(net):
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net


def packed(net, method=None, **options):
    sb.prepare(norms_at_random(net), method or sb.LowRes(levels=3))
    return sb.pack(sb.freeze(net), precision="float32", **options).eval()


def product_bound(layer, args, y):
    """Of a Linear or convolution: the products, the bias and what is added, in any order."""
    x, bias = args["x"].abs(), layer.bias
    w = layer.weight.double().abs()
    n = w[0].numel() + 8
    if layer.packed.up is not None:  # both parts are summed on their own
        up, down = (part.double().abs() for part in layer.packed.factors())
        groups = down.shape[0] // up.shape[1]
        extra = up.reshape(groups, -1, up.shape[1]) @ down.reshape(groups, up.shape[1], -1)
        w = layer.packed.matrix().decoded().double().abs() + extra.reshape(w.shape)
        n += 2 * up.shape[1]
    if isinstance(layer, PACKED[nn.Linear]):
        size = F.linear(x, w)
    elif "Transpose" in type(layer).__name__:
        n = w.numel() + 8
        conv = type(layer).function
        size = conv(x, w, None, layer.stride, layer.padding, layer.output_padding, layer.groups,
                    layer.dilation)  # fmt: skip
    else:
        size = type(layer).function(x, w, None, layer.stride, layer.padding, layer.dilation,
                                    layer.groups)  # fmt: skip
    if bias is not None:
        wide = (1, -1) + (1,) * (size.ndim - 2)
        flat = isinstance(layer, PACKED[nn.Linear])
        size = size + (bias.double().abs() if flat else bias.double().abs().view(wide))
    if "plus" in args:
        size = size + args["plus"].abs()
    return gamma(n) * size


def attention_bound(layer, args, y):
    """Of self-attention: errors of the projections go through the scores, and the mixing."""
    x = args["query"]
    w, bias = layer.in_proj_weight.double(), layer.in_proj_bias.double()
    size, heads = F.linear(x.abs(), w.abs(), bias.abs()), layer.num_heads

    def split(t):
        return t.chunk(3, -1)

    def shape(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = map(shape, split(F.linear(x, w, bias)))
    eq, ek, ev = (shape(t) * gamma(x.shape[-1] + 8) for t in split(size))
    d, keys = q.shape[-1], k.shape[-2]

    def up(a, b):
        return a @ b.transpose(-1, -2)

    es = up(eq, k.abs()) + up(q.abs() + eq, ek) + gamma(d + 4) * up(q.abs() + eq, k.abs() + ek)
    scores = up(q, k) * d**-0.5
    if args.get("attn_mask") is not None:
        scores = scores + args["attn_mask"]
    p = scores.softmax(-1)
    worst = (es * d**-0.5).amax(-1, keepdim=True)
    spread = scores.amax(-1, keepdim=True) - scores
    spread = spread.masked_fill(spread.isinf(), 0).amax(-1, keepdim=True)
    relative = torch.expm1(2 * worst) + (keys + 8 + 2 * spread) * 2 * U
    eo = p @ ev + (relative + gamma(keys + 8)) * (p @ (v.abs() + ev))
    mixed, eo = ((t.transpose(1, 2).flatten(2)) for t in ((p @ v).abs() + eo, eo))
    wo = layer.out_proj.weight.double().abs()
    bo = layer.out_proj.bias.double().abs()
    return F.linear(eo, wo) + gamma(mixed.shape[-1] + 8) * F.linear(mixed, wo, bo)


LINEAR = ("Linear", "Conv2d", "MatMul", "ReduceMean", "ReduceSum", "AveragePool2d",
          "AdaptiveAveragePool2d")  # fmt: skip


def other_bound(node, args, y, source):
    """Of operators that hold no packed weight."""
    tensors = [a for a in args.values() if isinstance(a, torch.Tensor)]
    if node.op in (
        *MOVES,
        "Item",
        "Relu",
        "Clip",
        "MaxPool1d",
        "MaxPool2d",
        "ReduceMax",
        "Concat",
        "Stack",
    ):
        return torch.zeros_like(y)
    if node.op in LINEAR:  # sums of products: of their sizes
        sizes = {k: a.abs() if isinstance(a, torch.Tensor) else a for k, a in args.items()}
        n = max(t.numel() for t in tensors) if node.op[0] in "RA" else tensors[0].numel()
        return gamma(n + 8) * run_node(node, sizes, source)
    if node.op in ("LayerNormalization", "GroupNormalization"):
        parts = args["x"]
        if node.op[0] == "G":
            parts = parts.reshape(args["num_groups"], -1)
        weight = 1 if args.get("weight") is None else args["weight"].abs().amax()
        return norm_sizes(parts, args["epsilon"]) * weight + 8 * U * y.abs()
    if node.op in ("Softmax", "LogSoftmax"):
        x, axis = args["x"], args["axis"]
        spread = (x.amax(axis, keepdim=True) - x).amax()
        size = y.abs() if node.op == "Softmax" else 1 + y.abs()
        return gamma(x.shape[axis] + 16) * (1 + 2 * spread) * size
    if node.op == "Attention":
        q, k, v = (args[n].abs() for n in "QKV")
        sizes = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        relative = torch.expm1(2 * gamma(q.shape[-1] + 8) * sizes.amax()) + 64 * U * (
            1 + sizes.amax()
        )
        return relative * v.amax(-2, keepdim=True)
    if node.op == "Sin":
        return 4 * U * (1 + args["x"].abs())
    return 8 * U * (3 * y.abs() + sum(x.abs().amax() for x in tensors))


def norm_sizes(x, epsilon):
    """The largest error of rows of x brought to mean 0 and variance 1: that of the mean, over the
    deviation, and through the variance."""
    n, top = x.shape[-1], x.abs().amax()
    centred = (x - x.mean(-1, keepdim=True)).abs()
    deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt().amin()
    return gamma(3 * n + 16) * 3 * top / deviation * (1 + centred.amax() / deviation)


def norm_bound(layer, args, y):
    """Of a norm as scale * x + shift, both rounded once."""
    from subbyte.modules.absorb import Affine, as_affine

    affine = layer if isinstance(layer, Affine) else as_affine("", layer)
    wide = (1, -1) + (1,) * (y.ndim - 2)
    scale, shift = (t.double().abs().view(wide) for t in (affine.scale, affine.shift))
    return 8 * U * (args["x"].abs() * scale + shift)


def bound_of(node, source, args, y):
    if node.op != "Layer":
        return other_bound(node, args, y, source)
    layer = source.net.get_submodule(node.layer)
    if isinstance(layer, PackedMultiheadAttention):
        return attention_bound(layer, args, y)
    if hasattr(layer, "packed") and node.layer and "Embedding" in type(layer).__name__:
        return 2 * U * y.abs()
    return product_bound(layer, args, y) if hasattr(layer, "packed") else norm_bound(layer, args, y)


def check_values(net, x, tmp_path, flags=None, name="net"):
    """Each value that the C code makes, against float64 from the C code's own values before it."""
    inputs = x if isinstance(x, tuple) else (x,)
    source = read_fused(Request(net, name, "float", x))  # as `export` does
    for suffix, data in float_files(name, source).files.items():
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    program = compiled(tmp_path / f"{name}.c", *([flags] if flags else []), probes=True)
    given = [t[:1].int().numpy() if not t.is_floating_point() else t[:1].numpy() for t in inputs]
    outputs, probes = program.run(*given), program.probes()
    of = {
        i.name: t[:1].double() if t.is_floating_point() else t[:1]
        for i, t in zip(source.program.inputs, inputs, strict=True)
    }
    double = {k: t.double() if t.is_floating_point() else t for k, t in source.state.items()}
    source = type(source)(source.program, source.net.double(), double, source.example)
    checked = 0
    with torch.no_grad():
        for node in source.program.nodes:
            args = {k: argument(v, of, source) for k, v in node.args.items()}
            y = of[node.out] = run_node(node, args, source)
            if isinstance(y, tuple):  # attention and its weights
                y = y[0]
            if node.out not in probes:
                continue
            found = torch.from_numpy(probes[node.out]).double().reshape(y.shape)
            bound = bound_of(node, source, args, y)
            error = (found - y).abs()
            assert (error <= bound).all(), (
                f"{node.op} {node.layer} {node.out}: {error.max():.2e} over {bound.max():.2e}"
            )
            of[node.out] = (found, None) if isinstance(of[node.out], tuple) else found
            checked += 1
    wanted = source.net.float()(*inputs)
    leaves = torch.utils._pytree.tree_leaves(wanted)
    for found, want in zip(outputs, leaves, strict=True):
        want = want[:1].detach().float().numpy().reshape(-1)
        assert np.isfinite(found).all()
        assert abs(found - want).max() <= 1e-4 * abs(want).max()
    return program, checked


@needs_gcc
def test_a_network_of_the_zoo(tmp_path):
    torch.manual_seed(0)
    net, x = packed(build("digitsnet")), torch.randn(2, 1, 8, 8)
    _, checked = check_values(net, x, tmp_path, name="digitsnet")
    assert checked >= 6


SLOW = {"lenet5": (1, 28), "cvnn1": (3, 32), "vit1": (3, 32), "fcnn1": (3, 32), "resnet20": (3, 32),
        "resnet56": (3, 32), "squeezenet11": (3, 64), "mobilenetv1": (3, 32), "vgg7": (3, 32),
        "cvnn2": (3, 32), "vit2": (3, 32), "fcnn2": (3, 32), "digitsnet": (1, 8),
        "resnet32": (3, 32), "resnet44": (3, 32)}  # fmt: skip


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_the_zoo(name, tmp_path):
    torch.manual_seed(0)
    channels, size = SLOW[name]
    sized = {"image_size": size} if name in ("squeezenet11", "mobilenetv1") else {}
    net = packed(build(name, **sized), sb.LowRes(levels=5))
    check_values(net, torch.randn(2, channels, size, size), tmp_path, (*STRICT, "-O2"), name)


class UNet(nn.Module):
    """Skips, a transposed convolution, resizing, padding, a group norm, two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle, self.groups = nn.Conv2d(16, 16, (3, 1), padding="same"), nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.mix, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.norm(self.a(x)))
        y = F.gelu(self.groups(self.middle(F.silu(self.down(a)))))
        y = torch.cat([a, self.up(y)], 1)
        y = F.interpolate(F.hardswish(self.mix(y)), scale_factor=2, mode="nearest")
        return {"map": self.out(y), "all": [y.mean((2, 3)), F.pad(y, (1, 1, 0, 0))[:, :, ::2]]}


@needs_gcc
def test_a_u_net(tmp_path):
    torch.manual_seed(0)
    _, checked = check_values(packed(UNet()), torch.randn(2, 3, 8, 12), tmp_path)
    assert checked >= 12


class Sequence(nn.Module):
    """A transformer encoder over tokens, with a mask, and a Conv1d before it."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(11, 16), nn.Conv1d(16, 16, 3, padding=1, dilation=1)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, activation="gelu")
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(16, 5)
        self.register_buffer("mask", torch.full((7, 7), float("-inf")).triu(1))

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + torch.tanh(self.conv(x.transpose(1, 2)).transpose(1, 2)) * 0.5
        for layer in self.layers:
            x = layer(x, src_mask=self.mask)
        return self.head(x[:, -1]).log_softmax(-1)


@needs_gcc
@pytest.mark.parametrize("levels", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_a_transformer_encoder(tmp_path, levels):
    torch.manual_seed(0)
    net = packed(Sequence(), sb.LowRes(levels=levels))
    check_values(net, torch.randint(0, 11, (2, 7)), tmp_path)


@needs_gcc
def test_two_inputs_and_self_attention(tmp_path):
    torch.manual_seed(0)
    check_values(packed(Mixed()), mixed_input(), tmp_path)


class Layers(nn.Module):
    """Layers whose windows, groups and sizes are odd on purpose, on one input."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3)),
            nn.Conv2d(6, 4, 3, groups=2, padding=4, bias=False),
            nn.Conv2d(6, 6, 5, groups=6, stride=3, padding=2),
            nn.Conv2d(6, 7, 1, stride=2),
            nn.ConvTranspose2d(6, 4, (2, 3), stride=(3, 2), padding=(1, 2), output_padding=(2, 0),
                               groups=2, dilation=(1, 2)),
        ])  # fmt: skip
        self.line = nn.Linear(7, 33)

    def forward(self, x):
        return [conv(x) for conv in self.convs] + [self.line(x).relu()]


def random_layer(module, grid, generator, rank=0):
    """A layer of random codes and scales; rank: of its adapter."""
    shape = module.weight.shape
    codes = torch.randint(0, grid.n_levels, shape, generator=generator).to(torch.uint8)
    from subbyte.core.functional import n_groups, round_scale

    scale = round_scale(
        torch.rand(n_groups(shape, grid), generator=generator) + 0.1, grid.scale_domain
    )
    tensor = QuantizedTensor(codes, scale, grid)
    if not rank:
        return QuantizedLayer(tensor, module.bias)
    groups = getattr(module, "groups", 1)
    up, down = (
        torch.randn(s, generator=generator)
        for s in ((shape[0], rank), (groups * rank, codes[0].numel()))
    )
    if rank % 2:
        up, down = (p.mul(40).clamp(-127, 127).to(torch.int8) for p in (up, down))
    else:
        up, down = up.half(), down.half()
    adapter = LowRank(up, down, torch.rand(groups * rank, generator=generator) / 50 + 0.01)
    return QuantizedLayer(tensor, module.bias, adapter)


GRIDS = [  # (grid, rank of the adapter: odd ones are int8)
    (uniform(2), 0),
    (uniform(3, PerChannel(0), ScaleDomain.FLOAT16), 2),
    (uniform(17, PerChannel(0), ScaleDomain.POWER_OF_TWO), 0),
    (uniform(16, PerGroup(4)), 3),
    (Grid((-3.0, -0.1, 0.0, 0.25, 1.0, 9.5), PerGroup(8)), 0),
    (uniform(200), 0),
]


@needs_gcc
@pytest.mark.parametrize("turn", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 2, 3))])
def test_layers_of_every_grid(turn, tmp_path):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    net = Layers()
    made = {}
    for at, (path, module) in enumerate(net.named_modules()):
        grid, rank = GRIDS[(at + turn) % len(GRIDS)]
        if turn == 0 and rank:  # with adapters nothing is fused
            grid, rank = GRIDS[0]
        if isinstance(module, nn.ConvTranspose2d):
            own = grid if not isinstance(grid.granularity, PerGroup) else uniform(5)
            own = Grid(own.levels, PerChannel(1), own.scale_domain)
            made[path] = random_layer(module, own, generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            made[path] = random_layer(module, grid, generator, rank)
    net = sb.pack(sb.Quantized(net, made), precision="float32").eval()
    _, checked = check_values(net, torch.randn(2, 6, 11, 7, generator=generator), tmp_path)
    assert checked >= 6


class Operators(nn.Module):
    """Operators without weights, and float layers."""

    def __init__(self):
        super().__init__()
        self.line, self.plain = nn.Linear(6, 6), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.shape, self.slope = (
            nn.Parameter(torch.randn(1, 4, 1, 6)),
            nn.Parameter(torch.rand(4, 1, 1)),
        )

    def forward(self, x):
        y = self.plain(x) * self.slope + self.shape
        pools = [
            F.max_pool2d(y, 3, 2, 1),
            F.avg_pool2d(y, (2, 3), (2, 1), (1, 1), ceil_mode=True),
            F.avg_pool2d(y, 2, count_include_pad=False, padding=1),
            F.adaptive_avg_pool2d(y, (3, 4)),
        ]
        z = self.line(x)
        each = [
            F.elu(z),
            F.leaky_relu(z, 0.1),
            F.hardsigmoid(z),
            F.mish(z),
            F.softplus(z),
            z.sigmoid(),
            F.gelu(z, approximate="tanh"),
            z.abs().sqrt(),
            z.pow(2),
            z.exp(),
            -z,
            1 - z,
            z / 3,
            z.clamp(-0.5, 0.25),
            torch.maximum(z, x),
            torch.sin(z),
            F.hardtanh(9 * z, 0, 6),
        ]
        a, b = z.chunk(2, -1)
        rest = [
            F.scaled_dot_product_attention(x, z, y, is_causal=True),
            x @ z.transpose(2, 3),
            a * b,
            z.roll(1, 3),
            z.flip(2),
            F.pixel_shuffle(z, 2),
            z.softmax(1),
            z.amax(2),
            z.sum((2, 3)),
            F.pad(z, (1, 2), value=0.5),
            z.repeat(1, 2, 1, 1),
            torch.stack([a, b], 2),
            F.rms_norm(z, (6,), self.slope.flatten()[:1].expand(6)),
            F.interpolate(z, (7, 9)),
            z.unfold(2, 3, 2),
            z.permute(2, 0, 3, 1)[1],
        ]
        return pools + each + rest


@needs_gcc
def test_operators(tmp_path):
    torch.manual_seed(0)
    net = Operators()
    sb.prepare(
        net, sb.Recipe((sb.Rule(names="plain", method=None), sb.Rule(method=sb.LowRes(levels=3))))
    )
    net = sb.pack(sb.freeze(net), precision="float32").eval()
    _, checked = check_values(net, torch.randn(2, 4, 6, 6), tmp_path)
    assert checked >= 30


# ---------------------------------------------------------------- integers


class Whole(nn.Module):
    """A residual network whose every operation runs in integers."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        y = F.relu(self.na(self.a(x)))
        z = torch.cat([F.relu(self.nb(self.b(y)) + y), y], 1)
        z = F.max_pool2d(z, 3, 2, 1)
        return self.head(torch.cat([F.adaptive_avg_pool2d(z, 1).flatten(1), z.mean((2, 3))], 1))


def fixed(net, bits, batchnorm):
    sb.prepare(norms_at_random(net), sb.SGM(bits=bits))
    return sb.pack(sb.freeze(net), batchnorm=batchnorm).eval()


def check_integers(program, net, x, fraction, bits):
    """Equal to the run of `integer_network`, every bit."""
    run, top = integer_network(net, fraction=fraction, bits=bits), 2 ** (bits - 1)
    text = (program.folder / f"{program.name}.h").read_text()
    behind = int(re.search(r"_Y_FRACTION (-?\d+)", text).group(1))
    kind = {"int32_t": np.int32, "int64_t": np.int64}[program.outputs[0][0]]
    given = np.clip(np.floor(np.ldexp(x.double().numpy(), fraction) + 0.5), -top, top - 1)
    wanted = run(x.double()).numpy()
    found = np.stack([program.run(one.astype(kind))[0] for one in given])
    assert (np.ldexp(found.astype(np.float64), -behind) == wanted.reshape(found.shape)).all()
    assert len(np.unique(wanted)) > 3


@needs_gcc
@pytest.mark.parametrize(
    ("batchnorm", "form", "fraction", "bits"),
    [("power_of_two", "int16", 8, 16), ("power_of_two", "int8", 4, 8), ("absorb", "int8", 4, 8)],
)
def test_lenet5_in_integers_is_equal_to_the_bit(batchnorm, form, fraction, bits, tmp_path):
    torch.manual_seed(0)
    net = fixed(build("lenet5"), 2, batchnorm)
    x = 3 * torch.randn(3, 1, 28, 28)
    done = sb.export(net, tmp_path / "lenet5.c", example=x, form=form)
    check_integers(compiled(done.path), net, x, fraction, bits)


@needs_gcc
@pytest.mark.parametrize(
    ("batchnorm", "bits"), [("power_of_two", 2), ("absorb", 3), ("power_of_two", 4)]
)
def test_sums_pools_and_groups_in_integers(batchnorm, bits, tmp_path):
    torch.manual_seed(bits)
    net = fixed(Whole(), bits, batchnorm)
    x = 2 * torch.randn(20, 1, 6, 8)
    done = sb.export(net, tmp_path / "net.c", example=x)  # auto: all layers are fixed point
    assert done.form == "int16, 8 bits behind the point"
    check_integers(compiled(done.path), net, x, 8, 16)


@needs_gcc
def test_shifts_of_norms_keep_the_half_that_rounding_asks_for(tmp_path):
    """A norm that enlarges leaves few bits behind the point, and the next layer rounds."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net = fixed(body, 2, "power_of_two")
    net[1].scale.fill_(2.0**7)
    net[1].shift.copy_((torch.tensor([3.0, 10.0, 21.0, 40.0]) + 0.5) * 2.0**-8)
    x = torch.randn(8, 1, 3, 3)
    done = sb.export(net, tmp_path / "net.c", example=x, form="int16")
    check_integers(compiled(done.path), net, x / 64, 8, 16)


def test_what_has_no_run_in_integers_is_named(tmp_path):
    x = torch.randn(2, 1, 6, 8)
    with pytest.raises(SubbyteError, match=r"layer 'a'.*SGM.*fixed_point\(2\)"):
        sb.export(packed(Whole()), tmp_path / "net.c", example=x, form="int8")
    with pytest.raises(SubbyteError, match=r"'na' is a BatchNorm.*power_of_two"):
        sb.export(fixed(Whole(), 2, "keep"), tmp_path / "net.c", example=x, form="int16")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- another machine, and refusals


@needs_arm
@pytest.mark.parametrize("form", ["float", "int8"])
def test_a_32_bit_arm_computes_the_same(form, tmp_path):
    torch.manual_seed(0)
    net = fixed(build("digitsnet"), 2, "power_of_two")
    net.precision = "float32"
    x = torch.randn(2, 1, 8, 8)
    done = sb.export(net, tmp_path / "digitsnet.c", example=x, form=form)
    run = (ARM, "-L", "/usr/arm-linux-gnueabihf")
    program = compiled(done.path, (*STRICT, "-O2", "-mthumb"), ARM_GCC, run)
    if form == "int8":
        check_integers(program, net, x, 4, 8)
        return
    arm = program.run(x[:1].numpy())[0]
    here = compiled(done.path).run(x[:1].numpy())[0]
    assert abs(arm - here).max() <= 1e-5 * abs(here).max()


class Refused(nn.Module):
    def __init__(self, layer, operation):
        super().__init__()
        self.layer, self.operation = layer, operation

    def forward(self, x):
        return self.operation(self.layer(x))


REFUSED = [
    (nn.Conv3d(2, 2, 1), (2, 2, 3, 3, 3), lambda x: x, r"layer 'layer' is a Conv3d"),
    (nn.Conv2d(2, 2, 1), (2, 2, 3, 3), lambda x: x.cumsum(2), r"operator 'CumSum' \(\w+\)"),
    (
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        (2, 2, 4, 4),
        lambda x: x,
        r"'layer' pads .*reflect",
    ),
]


@pytest.mark.parametrize(
    ("layer", "shape", "operation", "message"), REFUSED, ids=["conv3d", "cumsum", "mode"]
)
def test_what_c_cannot_hold_is_named(layer, shape, operation, message, tmp_path):
    net = Refused(layer, operation)
    sb.prepare(net, sb.LowRes(levels=3))
    with pytest.raises(SubbyteError, match=message) as caught:
        sb.export(sb.pack(sb.freeze(net)), tmp_path / "net.c", example=torch.randn(shape))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_scales_along_another_dimension_are_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 3, 1))
    made = {"0": random_layer(net[0], uniform(3, PerChannel(1)), torch.Generator())}
    with pytest.raises(SubbyteError, match=r"layer '0' has a scale per .*PerChannel\(0\)"):
        sb.export(
            sb.pack(sb.Quantized(net, made)), tmp_path / "net.c", example=torch.randn(2, 4, 3, 3)
        )


def test_names_and_numbers_of_c():
    assert identifier("my-net.v2") == "my_net_v2"
    assert identifier("2net") == "net_2net"
    assert identifier("while") == "while_network"
    assert literal(1.0) == "1.0f"
    assert literal(1e-45) == "1.40129846e-45f"
    assert literal(float("-inf")) == "-INFINITY"
    assert np.float32(literal(0.1)[:-1]) == np.float32(0.1)


@needs_gcc
def test_form_small_rounds_scales_and_biases_to_float16(tmp_path):
    torch.manual_seed(0)
    net, x = packed(build("digitsnet")), torch.randn(2, 1, 8, 8)
    sizes = [
        sb.export(net, tmp_path / f"{form}.c", example=x, form=form).notes
        for form in ("float", "small")
    ]
    whole, half = (
        int(re.search(r"constants ([\d,]+)", n[-1]).group(1).replace(",", "")) for n in sizes
    )
    channels = sum(m.weight.shape[0] for m in net.modules() if hasattr(m, "packed"))
    assert 2 * channels <= whole - half <= 4 * channels
    found = compiled(tmp_path / "small.c").run(x[:1].numpy())[0]
    wanted = net(x)[0].detach().numpy()
    error = abs(found - wanted).max() / abs(wanted).max()
    assert 2**-20 < error < 2**-11 * 20  # ten layers, each within 2^-11 twice


def test_form_small_refuses_what_float16_does_not_hold(tmp_path):
    net, x = packed(build("digitsnet")), torch.randn(2, 1, 8, 8)
    net.features[0].packed.scale.mul_(1e7)
    with pytest.raises(SubbyteError, match=r"'features.0.*scales' holds .*float16.*form='float'"):
        sb.export(net, tmp_path / "net.c", example=x, form="small")


@needs_gcc
def test_a_saved_file_needs_no_example(tmp_path):
    torch.manual_seed(0)
    net, x = packed(Whole()), torch.randn(2, 1, 6, 8)
    sb.save(net, tmp_path / "net.safetensors", example=x)
    again = sb.load(tmp_path / "net.safetensors", precision="float32")
    (tmp_path / "a").mkdir()
    sb.export(again, tmp_path / "a" / "net.c")
    text = (tmp_path / "a" / "net.h").read_text()
    assert re.search(r"arena: [\d,]+ bytes", text)
    found = compiled(tmp_path / "a" / "net.c").run(x[:1].numpy())[0]
    assert abs(found - net(x)[0].detach().numpy()).max() <= 1e-5 * abs(found).max()
