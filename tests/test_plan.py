"""One plan for both roads: made by either, printed, saved, edited, used by either."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import LSQ, SGM, TWN, CoRa, LowRes, PublishedCoRa, Recipe, Rule, SubbyteError
from subbyte.core.plan import Plan, PlannedLayer


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)
    ).eval()


X = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))


def levels(done):
    return {name: layer.weight.grid.n_levels for name, layer in done.layers.items()}


def test_a_recipe_gives_every_layer_its_method():
    """Each layer's codes are those of its method alone: no step after them hides the difference."""
    fine = CoRa(bits=4, tune=0, in_order=False)
    coarse = CoRa(levels=3, codes="rtn", tune=0, in_order=False)
    recipe = Recipe((Rule("4"), Rule("0", method=fine), Rule(method=coarse)))
    done = sb.quantize(mlp(), recipe, calibration=[X])
    assert levels(done) == {"0": 16, "2": 3}
    assert {x.name: x.levels for x in done.evidence.plan.layers} == {"0": 16, "2": 3, "4": 0}
    for name, method in (("0", fine), ("2", coarse)):
        alone = sb.quantize(mlp(), method, calibration=[X])
        assert torch.equal(done.layers[name].weight.codes, alone.layers[name].weight.codes)


def test_each_budget_is_of_the_layers_of_its_rule():
    rich, poor = CoRa(target_bits=6.0, tune=0), CoRa(target_bits=2.6, tune=0)
    done = sb.quantize(mlp(), Recipe((Rule("0", method=rich), Rule(method=poor))), calibration=[X])
    bits = {
        name: 8 * layer.n_bytes / layer.weight.codes.numel() for name, layer in done.layers.items()
    }
    assert 4 < bits["0"] <= 6
    others = [done.layers[name] for name in ("2", "4")]
    assert 8 * sum(x.n_bytes for x in others) <= 2.6 * sum(x.weight.codes.numel() for x in others)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ((Rule("0", method=CoRa(bits=3, tune=0)), Rule(method=CoRa(bits=3))),
         "rules differ in tune, 0 and 250"),
        ((Rule("0", method=CoRa(bits=3)), Rule(method=CoRa(bits=3, in_order=False))), "in_order"),
        ((Rule(method=LowRes()),), "is no method of quantize; give CoRa"),
        ((Rule("0", method=CoRa(bits=3)), Rule(method=PublishedCoRa())), "searches over the netw"),
        ((Rule("nine", method=CoRa(bits=3)), Rule()), "matches no layer"),
        ((Rule(),), "no layer left that is quantized"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_is_named(rules, says):
    with pytest.raises(SubbyteError, match=says):
        sb.quantize(mlp(), Recipe(rules), calibration=[X])


def test_a_searched_plan_trains(tmp_path):
    searched = sb.quantize(mlp(), CoRa(levels=5, tune=0), calibration=[X]).evidence.plan
    searched.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["layers"][1]["levels"] = 9
    content["layers"][2]["levels"] = 0
    (tmp_path / "plan.json").write_text(json.dumps(content))
    model = mlp()
    used = sb.prepare(model, LowRes(beta=1.2), plan=Plan.load(tmp_path / "plan.json"))
    assert levels(sb.freeze(model)) == {"0": 5, "2": 9}
    assert [x.levels for x in used.layers] == [5, 9, 0]
    assert "LowRes(levels=9, beta=1.2)" in str(used)


def test_a_plan_of_prepare_quantizes(tmp_path):
    recipe = Recipe((Rule("2"), Rule("0", method=LowRes(levels=7)), Rule(method=SGM(bits=2))))
    plan = sb.prepare(mlp(), recipe)
    assert [x.levels for x in plan.layers] == [7, 0, 3]
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    done = sb.quantize(mlp(), CoRa(bits=8, tune=0), calibration=[X], plan=again)
    assert levels(done) == {"0": 7, "4": 3}
    assert str(again).splitlines()[0].split() == ["layer", "type", "shape", "weights", "levels"]


def test_the_published_form_follows_a_plan_too():
    plan = Plan((PlannedLayer("0", "Linear", (), 5, rank=2), PlannedLayer("4", "Linear", (), None)))
    done = sb.quantize(mlp(), PublishedCoRa(bits=4), calibration=[X], plan=plan)
    assert levels(done) == {"0": 5, "4": 16}
    assert done.layers["0"].adapter.rank == 2
    assert [(x.levels, x.rank) for x in done.evidence.plan.layers] == [(5, 2), (0, 0), (16, 0)]
    assert done.evidence.iterations == 0


def test_levels_left_open_are_the_methods():
    open_ = Plan((PlannedLayer("0", "Linear", (32, 16), None), PlannedLayer("2", "Linear", (), 0)))
    done = sb.quantize(mlp(), CoRa(levels=6, tune=0), calibration=[X], plan=open_)
    assert levels(done) == {"0": 6}


@pytest.mark.parametrize(
    ("method", "levels", "rank", "says"),
    [
        (LowRes(), 5, 2, "an adapter of rank 2; training has none"),
        (TWN(), 5, 0, r"5 levels, and TWN\(\) has no choice of levels"),
        (SGM(), 5, 0, "layer '0': levels=5; fixed point has 3, 7, 15"),
        (LSQ(), 4, 0, "layer '0': levels=4; fixed point"),
    ],
)
def test_a_plan_that_training_cannot_follow_is_named(method, levels, rank, says):
    plan = Plan((PlannedLayer("0", "Linear", (32, 16), levels, rank),))
    model = mlp()
    with pytest.raises(SubbyteError, match=says):
        sb.prepare(model, method, plan=plan)
    assert not any(hasattr(m, "parametrizations") for m in model.modules())


@pytest.mark.parametrize("method", [LSQ(), SGM(), LowRes()], ids=str)
def test_every_method_with_levels_follows_a_plan(method):
    plan = Plan(tuple(PlannedLayer(name, "Linear", (), 15) for name in ("0", "4")))
    model = mlp()
    sb.prepare(model, method, plan=plan)
    assert levels(sb.freeze(model)) == {"0": 15, "4": 15}


def test_a_plan_of_another_network_is_named_on_both_roads():
    plan = Plan((PlannedLayer("body", "Linear", (2, 2), 5),))
    with pytest.raises(SubbyteError, match=r"the plan names layer 'body'.*it has 0, 2, 4"):
        sb.prepare(mlp(), LowRes(), plan=plan)
    with pytest.raises(SubbyteError, match=r"the plan names layer 'body'.*it has 0, 2, 4"):
        sb.quantize(mlp(), CoRa(bits=3), calibration=[X], plan=plan)
    gone = replace(plan, layers=(replace(plan.layers[0], levels=0),))
    with pytest.raises(SubbyteError, match="no layer left that is quantized"):
        sb.quantize(mlp(), CoRa(bits=3), calibration=[X], plan=gone)
