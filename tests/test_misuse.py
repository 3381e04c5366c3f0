"""Whatever the C++ core is given, it answers or raises: no signal, and no loop without end."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import LowRes, SubbyteError
from subbyte.packing import radix

core = pytest.importorskip("subbyte._native", reason="the C++ core was not built")

# A valid call of each function, its arguments by name; `numbers` are tried in place of each.
PRELUDE = """
import itertools, sys, torch
from subbyte import _native as core
from subbyte.packing import radix

INF = float("inf")
words = lambda n: radix.pack(torch.arange(n).remainder(3).to(torch.uint8), 3)
panel = lambda: core.make_panel(**CALLS["make_panel"][1]())
groups = lambda: core.make_panel_of_groups(**CALLS["make_panel_of_groups"][1]())
conv = lambda groups=1: core.make_conv(words(8 * (4 // groups) * 9), 3, 40,
    [4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, groups], torch.ones(8), 1, 1)
finish = dict(bias=None, plus=None, low=-INF, high=INF, planes=1, threads=1)
CALLS = {
    "radix_pack": (core.radix_pack, lambda: dict(
        codes=torch.zeros(50, dtype=torch.uint8), levels=3, digits=40,
        words=torch.zeros(16, dtype=torch.uint8))),
    "radix_unpack": (core.radix_unpack, lambda: dict(
        words=torch.zeros(16, dtype=torch.uint8), levels=3, digits=40,
        codes=torch.zeros(50, dtype=torch.uint8))),
    "select_tier": (core.select_tier, lambda: dict(name=core.tier())),
    "spin_int8": (core.spin_int8, lambda: dict(tier=core.tier(), rounds=2, threads=1)),
    "spin_float": (core.spin_float, lambda: dict(rounds=2, threads=1)),
    "Stream": (core.Stream, lambda: dict(bytes=4096)),
    "read": (core.Stream(4096).read, lambda: dict(passes=1, threads=1)),
    "make_panel": (core.make_panel, lambda: dict(
        words=words(8 * 60), levels=3, digits=40, first_row=0, rows=8, row_length=60,
        order=torch.arange(60, dtype=torch.int32), scale=torch.ones(8), factor=1, center=1)),
    "make_panel_of_groups": (core.make_panel_of_groups, lambda: dict(
        words=words(8 * 60), levels=3, digits=40, rows=8, row_length=60, shared=8,
        scale=torch.ones(64), unit=1.0, factor=1, center=1)),
    "make_conv": (core.make_conv, lambda: dict(
        words=words(8 * 4 * 9), levels=3, digits=40,
        sizes=[4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1], scale=torch.ones(8), factor=1, center=1)),
    "linear": (lambda **k: panel().linear(**k), lambda: dict(
        finish, x=torch.ones(2, 60), y=torch.empty(2, 8))),
    "linear of groups": (lambda **k: groups().linear(**k), lambda: dict(
        finish, x=torch.ones(2, 60), y=torch.empty(2, 8))),
    "conv2d": (lambda **k: conv().conv2d(**k), lambda: dict(
        finish, x=torch.ones(2, 4, 5, 5), y=torch.empty(2, 8, 5, 5), last=False)),
    "glance": (lambda **k: core.Origin(words(50), torch.ones(2)).glance(**k), lambda: dict(
        words=words(50), scale=torch.ones(2))),
}

def attempt(label, call):
    print(label, end=" -> ", flush=True)
    try:
        call()
        print("answered", flush=True)
    except Exception as error:
        print(type(error).__name__, "|", str(error).partition("\\n")[0], flush=True)
"""

SWEEP = (
    PRELUDE
    + """
numbers = [-2**63, -2**31, -1, 0, 1, 2, 3, 64, 257, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64]
others = [None, "avx1024", "", [], torch.empty(0), torch.ones(3), torch.ones(2, 2)[:, :1],
          torch.ones((), dtype=torch.uint8), torch.ones(8, device="meta"),
          torch.ones(2, 60).double(),
          torch.ones(60, 2).t(), torch.ones(16, dtype=torch.uint8)[::2], torch.ones(1, 4, 1, 1),
          torch.ones(2, 8, 5, 5, dtype=torch.float16), torch.ones(0, 60), torch.ones(0, 4, 5, 5)]
for name, (function, arguments) in CALLS.items():
    attempt(f"{name}, as it should be", lambda: function(**arguments()))
    for key, value in itertools.product(arguments(), numbers + others):
        given = {**arguments(), key: value}
        attempt(f"{name} {key}={str(value)[:30]!r}", lambda: function(**given))
for place, value in itertools.product(range(13), numbers):
    sizes = CALLS["make_conv"][1]()["sizes"]
    sizes[place] = value
    def call():
        made = core.make_conv(**{**CALLS["make_conv"][1](), "sizes": sizes})
        made.conv2d(**{**CALLS["conv2d"][1]()})
    attempt(f"make_conv sizes[{place}]={value}", call)
print("END")
"""
)

WRONG = {  # each raises ValueError or TypeError
    "radix levels": [
        f"core.radix_{way}pack(**CALLS['radix_{way}pack'][1]() | dict(levels={levels}))"
        for way in ("", "un")
        for levels in (0, 1, 2, 4, 257)
    ],
    "radix digits": [
        f"core.radix_unpack(**CALLS['radix_unpack'][1]() | dict(digits={digits}))"
        for digits in (0, 1, 39, 41, 64)
    ],
    "panels": [
        f"core.make_panel(**CALLS['make_panel'][1]() | dict({change}))"
        for change in (
            "first_row=-1", "first_row=1", "rows=0", "rows=-8", "rows=2**62", "row_length=0",
            "row_length=2**62", "row_length=-60", "scale=torch.ones(7)", "scale=torch.ones(8, 1)",
            "order=torch.tensor([-2], dtype=torch.int32)",
            "order=torch.tensor([60], dtype=torch.int32)",
            "order=torch.empty(0, dtype=torch.int32)", "order=torch.arange(60)", "factor=0",
            "factor=3", "center=128", "center=-126", "words=words(8 * 60)[:-1]", "levels=5",
        )
    ],
    "panels of groups": [
        f"core.make_panel_of_groups(**CALLS['make_panel_of_groups'][1]() | dict({change}))"
        for change in (
            "rows=0", "rows=-8", "rows=2**62", "rows=9", "row_length=0", "row_length=2**62",
            "row_length=-60", "row_length=61", "scale=torch.ones(63)", "scale=torch.ones(8, 8)",
            "shared=0", "shared=-8", "shared=6", "shared=3", "shared=2**62", "factor=3",
            "center=128", "words=words(8 * 60)[:-1]", "levels=5",
        )
    ],
    "convolutions": [
        f"core.make_conv(**CALLS['make_conv'][1]() | dict(sizes={sizes}))"
        for sizes in (
            [], [4] * 12, [4] * 14,
            [0, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1], [4, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [4, 8, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1], [4, 8, 3, 3, 0, 1, 1, 1, 1, 1, 1, 1, 1],
            [4, 8, 3, 3, 1, 1, 0, 1, 1, 1, 1, 1, 1], [4, 8, 3, 3, 1, 1, 1, 1, -1, 1, 1, 1, 1],
            [4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0], [4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 3],
            [4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, -1],
            [2**33, 8, 2**31, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
        )
    ],
    "products": [
        f"CALLS['{name}'][0](**CALLS['{name}'][1]() | dict({change}))"
        for name, changes in {
            "linear": (
                "x=torch.ones(2, 59)", "x=torch.ones(3, 60)", "y=torch.empty(2, 9)", "x=0",
                "y=None",
                "y=torch.empty(8, 2).t()", "bias=torch.ones(7)", "bias=torch.ones(16)[::2]",
                "bias=torch.ones(8).double()", "plus=torch.ones(2, 7)",
                "plus=torch.ones(8, 2).t()",
                "planes=3", "planes=-1", "threads=0", "threads=-1",
                "x=torch.ones(2, 60, device='meta')",
            ),
            "conv2d": (
                "x=torch.ones(2, 4, 5)", "x=torch.ones(2, 3, 5, 5)", "y=torch.empty(2, 8, 4, 5)",
                "y=torch.empty(1, 8, 5, 5)", "last=True", "bias=torch.ones(9)", "threads=0",
                "plus=torch.ones(2, 8, 5, 4)", "planes=3",
                "x=torch.ones(2, 5, 5, 4).permute(0, 3, 1, 2)",
            ),
        }.items()
        for change in changes
    ],
    "roofs": [
        "core.Stream(0)", "core.Stream(2**63)", "core.Stream(2**64 - 1)", "core.Stream(-1)",
        "core.Stream(4096).read(0, 1)", "core.Stream(4096).read(-1, 1)",
        "core.Stream(4096).read(1, 0)",
        "core.Stream(4096).read(2**31 - 1, 1)", "core.spin_int8('portable', -1, 1)",
        "core.spin_int8('portable', 2**62, 1)", "core.spin_int8('avx1024', 1, 1)",
        "core.spin_int8('portable', 1, 0)", "core.spin_float(-1, 1)", "core.spin_float(2**62, 1)",
        "core.spin_float(1, -1)", "core.select_tier('avx1024')", "core.select_tier('')",
        "core.Panel()", "core.Panel.__new__(core.Panel).rows", "core.Origin(None, None)",
    ],
}  # fmt: skip


def run(code):
    """Lines of 'label -> outcome' from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit code {done.returncode} in: {lines[-1]} {done.stderr[-500:]}"
    return lines


def test_no_argument_of_any_function_ends_the_process():
    lines = run(SWEEP)
    assert lines[-1] == "END"
    assert len(lines) > 1000
    valid = [line for line in lines if "as it should be" in line]
    assert len(valid) == 14
    assert all(line.endswith("-> answered") for line in valid)
    raised = {line.partition(" -> ")[2].split()[0] for line in lines[:-1]}
    assert raised == {"answered", "ValueError", "TypeError"}


def test_every_wrong_call_says_so():
    calls = [call for group in WRONG.values() for call in group]
    code = PRELUDE + "".join(f"attempt({call!r}, lambda: {call})\n" for call in calls)
    lines = run(code)
    assert len(lines) == len(calls)
    outcomes = {line: line.rpartition(" -> ")[2].split()[0] for line in lines}
    silent = [line for line, how in outcomes.items() if how not in ("ValueError", "TypeError")]
    assert not silent


def test_a_panel_of_another_instruction_set_is_refused():
    if "avx512vbmi" not in core.tiers():
        pytest.skip("this CPU has no AVX-512 VBMI, whose panels others cannot read")
    before = core.tier()
    codes, order = torch.zeros(60, dtype=torch.uint8), torch.arange(60, dtype=torch.int32)
    try:
        core.select_tier("avx512vbmi")
        panel = core.make_panel(radix.pack(codes, 3), 3, 40, 0, 1, 60, order, torch.ones(1), 1, 1)
        core.select_tier("portable")
        with pytest.raises(ValueError, match="another instruction set"):
            panel.linear(torch.ones(1, 60), torch.empty(1, 1), None, None, 0.0, 1.0, 1, 1)
    finally:
        core.select_tier(before)


@pytest.mark.parametrize("levels", [-3, 0, 1, 257])
def test_radix_words_need_levels(levels):
    with pytest.raises(SubbyteError, match=f"{levels} levels"):
        radix.digits_per(levels, 64)


# ---------------------------------------------------------------- through the modules


def packed(layer):
    model = nn.Sequential(layer)
    sb.prepare(model, LowRes(levels=5))
    return sb.pack(model, sb.freeze(model))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 12)),
    "conv": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("precision", ["int8", "int16", "float32"])
def test_a_bias_of_another_length_is_named(kind, precision):
    make, size = LAYERS[kind]
    net, x = packed(make()), torch.randn(size)
    net[0].precision = precision
    right = net[0].bias
    for wrong in (torch.ones(3), torch.ones(9), torch.ones(8, 1), torch.ones(8, device="meta")):
        net[0].bias = nn.Parameter(wrong, requires_grad=False)
        with pytest.raises(
            SubbyteError, match=r"weight \[8, .*bias (is \[.*expected \[8\]|has no memory)"
        ):
            net(x)
    net[0].bias = right
    right.data = torch.ones(3)  # past the module: the same tensor, shorter
    with pytest.raises(SubbyteError, match=r"bias is \[3\]; expected \[8\]"):
        net(x)


def test_a_bias_with_gaps_or_of_another_type_is_read_as_it_is():
    net, x = packed(nn.Linear(12, 8)), torch.randn(2, 12)
    values = torch.arange(8.0)
    net[0].bias = nn.Parameter(values, requires_grad=False)
    wanted = net(x)
    for same in (torch.arange(16.0).div(2)[::2], values.double(), values.bfloat16()):
        net[0].bias = nn.Parameter(same, requires_grad=False)
        assert torch.equal(net(x), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("words", torch.zeros(8, dtype=torch.uint8)),
        ("words", torch.zeros(800, dtype=torch.uint8)),
        ("words", torch.zeros(32)),
        ("words", torch.zeros(32, dtype=torch.uint8, device="meta")),
        ("scale", torch.ones(3)),
        ("scale", torch.ones(1, device="meta")),
    ],
)
def test_words_and_scales_that_do_not_fit_are_refused(name, value):
    net = packed(nn.Linear(12, 8))
    assert net[0].packed.words.numel() == 32
    setattr(net[0].packed, name, value)
    with pytest.raises(SubbyteError):
        net(torch.randn(2, 12))
