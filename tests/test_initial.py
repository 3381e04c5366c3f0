"""What a run may start from: float weights, a packed file, another run's checkpoint."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import subbyte as sb
from subbyte import SGM, LowRes, Recipe, Rule, SubbyteError
from subbyte.commands.demo import BASE
from subbyte.models import build
from subbyte.train import run, train
from subbyte.train.initial import load_initial


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "averaged"])
def finished(request, tmp_path_factory):
    """One step of a 2-bit SGM run, and the network that it ended with."""
    out = tmp_path_factory.mktemp("start")
    config = replace(
        BASE,
        recipe=Recipe((Rule(method=SGM(bits=2)),)),
        train=replace(BASE.train, threads=1, epochs=1, limit_batches=2, ema=request.param),
        out=out,
    )
    return run(config, quiet=True), train(config, fresh=True).model


def test_from_the_checkpoint_of_a_prepared_run(finished):
    result, model = finished
    net = build("digitsnet")
    load_initial(net, result.file.with_name("checkpoint.pt"))
    expected = sb.float_state_dict(model)
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_from_a_packed_file(finished):
    result, model = finished
    net = build("digitsnet")
    load_initial(net, result.file)
    layers = sb.freeze(model).layers
    for name, layer in layers.items():
        assert torch.equal(net.get_submodule(name).weight, layer.weight.dequantize())
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(net.eval()(x), sb.load(result.file, precision="float32")(x), atol=1e-5)


def test_from_float_weights_as_before(tmp_path):
    net = build("digitsnet")
    config = replace(BASE, train=replace(BASE.train, threads=1, epochs=1, limit_batches=1))
    result = run(replace(config, out=tmp_path), quiet=True)
    load_initial(net, result.file)
    for name, value in load_file(result.file).items():
        assert torch.equal(net.state_dict()[name], value)


def test_a_packed_attention_layer_is_decoded_into_its_projections(tmp_path):
    net = build("vit1", image_size=8, in_channels=1)
    sb.prepare(net, LowRes(levels=5))
    done = sb.freeze(net)
    layers = done.layers
    sb.save(sb.pack(done), tmp_path / "vit.safetensors")
    fresh = build("vit1", image_size=8, in_channels=1)
    load_initial(fresh, tmp_path / "vit.safetensors")
    name = next(name for name in layers if name.endswith("in_proj"))
    weight = fresh.get_parameter(f"{name}_weight")
    assert torch.equal(weight, layers[name].weight.dequantize())


def test_adapters_are_part_of_the_start(tmp_path):
    net = build("digitsnet")
    sb.prepare(net, LowRes(levels=3))
    done = sb.freeze(net)
    name, layer = next((n, x) for n, x in done.layers.items() if x.weight.codes.ndim == 4)
    out, width = len(layer.weight.codes), layer.weight.codes[0].numel()
    adapter = sb.LowRank(torch.rand(out, 1).half(), torch.rand(1, width).half(), torch.ones(1))
    layers = {**done.layers, name: replace(layer, adapter=adapter)}
    packed = sb.pack(replace(done, layers=layers))
    sb.save(packed, tmp_path / "net.safetensors")
    fresh = build("digitsnet")
    load_initial(fresh, tmp_path / "net.safetensors")
    assert torch.equal(fresh.get_submodule(name).weight, packed.get_submodule(name).weight)


def test_bad_starts_are_named(finished, tmp_path):
    net = build("digitsnet")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    absorbed = tmp_path / "absorbed.safetensors"
    done = sb.freeze(finished[1])
    sb.save(sb.pack(done, batchnorm="absorb"), absorbed)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"PK\x03\x04 no more")
    for path, says in (
        (tmp_path / "none.pt", "there is no weights file"),
        (damaged, "the checksum does not fit"),
        (absorbed, "BatchNorms were absorbed"),
    ):
        with pytest.raises(SubbyteError, match=says):
            load_initial(net, path)
    with pytest.raises(SubbyteError, match="weights of another network"):
        load_initial(build("fcnn1"), finished[0].file)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
