"""A table of embeddings and a head that are one weight: quantized, packed and stored once."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import subbyte as sb
from subbyte.core.sites import sharing_sites, sites
from subbyte.errors import SubbyteError
from subbyte.ptq.evidence.sensitivity import sensitivity
from subbyte.ptq.evidence.statistics import input_statistics
from subbyte.storage import writer
from subbyte.tasks import Language


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Tied(nn.Module):
    def __init__(self, bias=True, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 24)
        self.body = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
        self.head = nn.Linear(24, 50, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids):
        return self.head(self.body(self.table(input_ids)))


IDS = torch.randint(50, (80, 8), generator=generator(1))


def quantized(**options):
    options = {"levels": 16, "tune": 4, **options}
    return sb.quantize(Tied().eval(), sb.CoRa(**options), calibration=[IDS])


def test_which_layers_share():
    assert {n: [s.name for s in own] for n, own in sharing_sites(Tied()).items()} == {
        "table": ["head"]
    }
    net = Tied()
    net.extra = net.table.weight  # a parameter of no layer holds it as well
    assert sharing_sites(net) == {}
    assert sharing_sites(Tied(tied=False)) == {}


@pytest.mark.parametrize("group", [None, 8])
def test_one_packed_weight_serves_both(group, tmp_path):
    done = quantized(group=group)
    assert [layer.name for layer in done.plan.layers] == ["table", "body.0", "body.2"]
    names = [p.name for p in done.parameters]
    assert "table.weight" in names
    assert "head.weight" not in names
    net = sb.pack(done)
    assert net.head.packed is net.table.packed
    assert torch.equal(net.head.weight, net.table.weight)
    assert net.head.bias is not None
    twin = Tied().eval()
    twin.load_state_dict(done.model.state_dict())
    with torch.no_grad():
        for site in sites(twin):
            layer = done.layers.get(site.name)
            if layer is not None:
                twin.get_submodule(site.owner).weight.copy_(layer.dequantize())
    exact = sb.pack(done, precision="float32")
    assert torch.allclose(exact(IDS), twin(IDS), atol=1e-4)

    path = tmp_path / "net.safetensors"
    sb.save(net, path, example=IDS[:2])
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["subbyte"])
        stored = list(file.keys())
    assert manifest["shared"] == {"head": "table"}
    assert manifest["version"] == 2
    assert [n for n in stored if n.endswith(".codes")] == [
        "body.0.codes", "body.2.codes", "table.codes",
    ]  # fmt: skip
    assert "head.bias" in manifest["state"]
    for again in (sb.load(path), sb.load(path, Tied()), sb.load(path, Tied(tied=False))):
        assert torch.equal(again(IDS), net(IDS))
        assert again.head.packed is again.table.packed
    sb.save(sb.load(path), tmp_path / "again.safetensors")
    assert torch.equal(sb.load(tmp_path / "again.safetensors")(IDS), net(IDS))


@pytest.mark.parametrize(
    ("shared", "says"),
    [
        ({"head": "absent"}, "which is not how its layers are"),
        ({"table": "body.0"}, "which is not how its layers are"),
        ({"absent": "table"}, "the network has no layer 'absent' to share"),
        ({"body.0": "table"}, "which is not how its layers are"),
        ({"head": 3}, "which is not how its layers are"),
        (["head"], "malformed"),
    ],
)
def test_a_manifest_that_shares_nonsense_is_refused(shared, says, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    compact = writer._compact
    monkeypatch.setattr(writer, "_compact", lambda m: compact({**m, "shared": shared}))
    sb.save(sb.pack(quantized(tune=0)), path)
    monkeypatch.undo()
    with pytest.raises(SubbyteError, match=says):
        sb.load(path, Tied())


def test_a_shared_weight_answers_for_both_uses():
    """Its metric is the mix of what the head sees and of what follows the table."""
    net = Tied().eval()
    own = [site for site in sites(net) if site.name != "head"]
    head = [site for site in sites(net) if site.name == "head"]
    seen = input_statistics(net, head, IDS.split(16))
    effects, tables = sensitivity(net, own, seen, IDS.split(16), Language(), generator())
    alone, reads = sensitivity(net, own, {}, IDS.split(16), Language(), generator())
    h, g = seen["head"].gram[0], reads["table"].gram[0]
    mixed = tables["table"].gram[0]
    found = torch.linalg.lstsq(
        torch.stack([h.flatten(), g.flatten()], 1), mixed.flatten()[:, None]
    ).solution.flatten()
    assert torch.allclose(found[0] * h + found[1] * g, mixed, rtol=1e-6)
    assert (found > 0).all()
    assert float(effects["table"].sum() * mixed.trace()) > float(alone["table"].sum() * g.trace())
