import pytest
import torch
from torch import nn

import subbyte as sb
from nets import Mixed, Tied
from subbyte import LowRes, Recipe, Rule, SubbyteError

FIVE, THREE = LowRes(levels=5), LowRes(levels=3)


def plan(model, *rules):
    return Recipe(rules).plan(model)


def test_the_first_match_wins_and_names_cover_every_kind():
    found = plan(
        Mixed(), Rule("head"), Rule("attn.*", method=THREE), Rule(types="Conv*", method=FIVE),
        Rule("*", method=THREE),
    )  # fmt: skip
    methods = {layer.name: layer.method for layer in found.layers}
    assert methods == {
        "conv": FIVE,
        "up": FIVE,
        "table": THREE,
        "attn.in_proj": THREE,
        "attn.out_proj": THREE,
        "head": None,
    }


def test_the_plan_is_a_table_with_every_layer_and_the_totals():
    text = str(plan(Mixed(), Rule("head"), Rule(method=FIVE)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "type", "shape", "weights", "method"]
    assert any(line.split() == ["conv", "Conv2d", "8x3x3x3", "216", "LowRes(levels=5)"]
               for line in lines)  # fmt: skip
    assert any(line.split()[0] == "head" and line.endswith("float") for line in lines)
    quantized = 216 + 288 + 176 + 768 + 256
    assert lines[-1].startswith(f"{quantized:,} weights quantized; 80 weights of layers kept float")


def test_a_pattern_that_matches_nothing_is_named_with_what_there_is():
    with pytest.raises(SubbyteError, match=r"rule 1.*'hed'.*matches no layer; there are: conv, up"):
        plan(Mixed(), Rule("hed", method=FIVE), Rule(method=FIVE))


def test_a_rule_that_an_earlier_one_swallows_is_named():
    with pytest.raises(SubbyteError, match=r"rule 2.*never applies.*'head'"):
        plan(Mixed(), Rule(method=FIVE), Rule("head"))


def test_a_layer_without_a_rule_is_named():
    with pytest.raises(SubbyteError, match="no rule matches layer 'up'"):
        plan(Mixed(), Rule("conv", method=FIVE))


@pytest.mark.parametrize(
    "layer", [nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.Bilinear(2, 3, 4), nn.EmbeddingBag(5, 3)]
)
def test_a_layer_that_cannot_be_quantized_stays_float_unless_asked_for_by_name(layer):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "odd": layer})
    kind = type(layer).__name__
    for rules in ((Rule(method=FIVE),), (Rule("odd"), Rule(method=FIVE))):
        kept = plan(model, *rules)
        assert [layer.name for layer in kept.quantized] == ["body"]
        assert {p.name: p.reason for p in kept.float_parameters if p.n_dims > 1} == {
            f"odd.{name}": f"{kind}: there is no packed layer of this kind"
            for name, weight in layer.named_parameters() if weight.ndim > 1
        }  # fmt: skip
    for rule in (Rule("odd", method=FIVE), Rule(types=kind, method=FIVE)):
        with pytest.raises(SubbyteError, match=f"layer 'odd' \\({kind}\\) cannot be quantized, as"):
            plan(model, rule, Rule(method=FIVE))


def test_the_plan_names_matrices_that_are_no_layers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.table = nn.Parameter(torch.zeros(3, 5))

    text = str(plan(Own(), Rule(method=FIVE)))
    assert "float: table, 15 values: Own is no layer that can be quantized" in text


def test_a_lazy_layer_is_asked_for_a_batch():
    with pytest.raises(SubbyteError, match="layer '0' has no shape yet"):
        plan(nn.Sequential(nn.LazyLinear(3)), Rule(method=FIVE))


def test_a_model_without_layers_is_an_error():
    with pytest.raises(SubbyteError, match="Sequential has no layer"):
        plan(nn.Sequential(nn.ReLU()), Rule(method=FIVE))


def test_tied_weights_stay_float_unless_asked_for_by_name():
    shared = "its weight is shared by ['head.weight', 'table.weight']"
    with pytest.raises(SubbyteError, match=r"'head' \(Linear\) cannot .*'head.weight', 'table.w"):
        sb.prepare(Tied(), Recipe((Rule("head", method=FIVE), Rule(method=FIVE))))
    model = Tied()
    found = sb.prepare(model, FIVE)
    assert {layer.name: layer.reason for layer in found.layers} == {
        "table": shared, "head": shared, "free": "",
    }  # fmt: skip
    assert model.head.weight is model.table.weight
    asked = Tied()
    sb.prepare(asked, Recipe((Rule("free", method=FIVE), Rule("table"), Rule("head"))))
    assert asked.head.weight is asked.table.weight


def test_a_module_used_twice_is_no_tie():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sb.prepare(model, FIVE)
    net = sb.pack(sb.freeze(model), precision="float32")
    assert net[0] is net[2]
    x = torch.randn(3, 4)
    torch.testing.assert_close(net(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [{"types": None}, {"names": 3}, {"types": LowRes(levels=3)}])
def test_patterns_are_text(given):
    with pytest.raises(SubbyteError, match="a name or a pattern in quotes"):
        Rule(**given)
