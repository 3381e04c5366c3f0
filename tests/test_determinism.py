"""The same seed and the same number of threads give the same bits; docs/reliability.md says why."""

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte.core.recipe import Recipe, Rule
from subbyte.methods import LowRes
from subbyte.train import DataConfig, LoopConfig, ModelConfig, RunConfig, train


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def trained(out, threads, seed=0):
    loop = LoopConfig(
        epochs=1, lr=0.05, batch_size=256, limit_batches=3, threads=threads, seed=seed
    )
    recipe = Recipe((Rule(method=LowRes(levels=3)),))
    config = RunConfig(ModelConfig("digitsnet"), DataConfig("digits", flip=True), loop, recipe, out)
    return train(config).model.state_dict()


def converted(seed=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
                        nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10)).eval()  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    done = sb.quantize(net, sb.CoRa(target_bits=3.5, tune=4), calibration=[x], seed=seed)
    return sb.pack(done).state_dict()


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_training_gives_the_same_bits(threads, tmp_path):
    first = trained(tmp_path / "first", threads)
    assert differing(first, trained(tmp_path / "second", threads)) == []
    assert differing(first, trained(tmp_path / "other", threads, seed=1))


@pytest.mark.usefixtures("threads")
def test_post_training_gives_the_same_bits():
    assert differing(converted(), converted()) == []
