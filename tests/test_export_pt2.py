"""Programs of PyTorch: opened in a fresh process, equal to the bit."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import subbyte as sb
from nets import Mixed, mixed_input
from subbyte.export.pt2 import decoded

OPEN = """
import sys, torch
{first}
x, y = torch.load(sys.argv[1])
net = torch.export.load(sys.argv[2]).module()
for given, wanted in zip(x, y):
    assert torch.equal(net(*given), wanted), (net(*given) - wanted).abs().max()
assert ("subbyte" in sys.modules) == {needs}
"""


def in_a_fresh_process(path, cases, packed):
    torch.save(cases, path.with_suffix(".pt"))
    first = "import subbyte" if packed else ""
    command = [
        sys.executable,
        "-c",
        OPEN.format(first=first, needs=packed),
        path.with_suffix(".pt"),
        path,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def check(net, inputs, form, tmp_path):
    """A fresh process computes what this one does, and packed operators what the network does."""
    done = sb.export(net, tmp_path / "net.pt2", example=inputs[0], form=form)
    assert done.form == form
    assert ("import subbyte" in done.notes[0]) == (form == "packed")
    again = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        found, wanted = [again(*x) for x in inputs], [net(*x) for x in inputs]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) if form == "packed" else torch.allclose(a, b, atol=1e-5)
    in_a_fresh_process(tmp_path / "net.pt2", (inputs, found), form == "packed")
    return done


@pytest.mark.parametrize("form", ["packed", "plain"])
def test_a_program_is_the_network(form, tmp_path):
    torch.manual_seed(0)
    net = Mixed()
    sb.prepare(net, sb.LowRes(levels=3))
    net = sb.pack(sb.freeze(net), precision="float32").eval()
    done = check(net, [mixed_input()], form, tmp_path)
    fixed = "torch.export fixes the batch at 4; give an example of the batch that is to run"
    assert (fixed in done.notes) == (form == "packed")  # by its packed table


def test_any_batch_runs(tmp_path):
    torch.manual_seed(0)
    net = Fused()
    sb.prepare(net, sb.LowRes(levels=3))
    net = sb.pack(sb.freeze(net), precision="float32").eval()
    inputs = [(torch.randn(n, 2, 5, 5),) for n in (1, 6)]
    assert len(check(net, inputs, "packed", tmp_path).notes) == 1


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return F.relu(self.a(x) + self.b(x))


def test_what_was_fused_into_a_layer_is_decoded_too():
    torch.manual_seed(0)
    net = Fused()
    sb.prepare(net, sb.LowRes(levels=3))
    net = sb.fuse(sb.pack(sb.freeze(net), precision="float32"))
    x = torch.randn(2, 2, 5, 5)
    plain = decoded(net)
    assert not [m for m in plain.modules() if "Packed" in type(m).__name__]
    assert torch.allclose(plain(x), net(x), atol=1e-6)
    assert (plain(x) >= 0).all()
    assert (plain(x) == 0).any()
