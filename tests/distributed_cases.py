"""What two processes do for tests/test_distributed.py; each leaves what it got in FOLDER.

python tests/distributed_cases.py FOLDER      (with RANK, WORLD_SIZE, ... set)
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import subbyte as sb
import subbyte.train
from subbyte.core.group import Group, joined
from subbyte.core.recipe import Recipe, Rule
from subbyte.data import load_images
from subbyte.errors import SubbyteError
from subbyte.models import Network, NetworkSpec
from subbyte.models.preprocess import centred
from subbyte.train import DataConfig, LoopConfig, ModelConfig, RunConfig, TrainResult, loop

METHODS = {
    "lowres": sb.LowRes(levels=5),
    "sgm": sb.SGM(bits=2, start=0.01, end=0.1),
    "twn": sb.TWN(),
    "lsq": sb.LSQ(bits=2),
}
CASES = [("ddp", "lowres"), ("ddp", "sgm"), ("ddp", "twn"), ("fsdp", "lowres"), ("fsdp", "sgm"),
         ("fsdp", "lsq")]  # fmt: skip
BATCH = 92  # of 359 images: the last batch is short and odd
LR, CLIP, EPOCHS = 0.02, 1.0, 2


class Tiny(Network):
    """Where two runs part for good over a rounding error, this network has nothing.

    Few weights: none lies so close to an edge between two levels. No maxima: with pixels and
    weights of few levels, different windows often have one maximum, and rounding would say whose.
    """

    def __init__(self) -> None:
        super().__init__(NetworkSpec("tiny"), centred(1, 8), 10)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def train(run: RunConfig, **options) -> TrainResult:
    """Of the tiny network, whatever the configuration says."""
    with mock.patch("subbyte.train.setup.build", side_effect=lambda *_, **__: Tiny()):
        return subbyte.train.train(run, **options)


def config(out: Path, method: str, strategy: str = "ddp", **changes) -> RunConfig:
    """Every part of a step that several processes could get wrong."""
    settings = {
        "epochs": EPOCHS, "lr": LR, "batch_size": BATCH, "momentum": 0.5, "ema": 0.5, "threads": 1,
        "clip_grad_norm": CLIP, "weight_decay": 1e-3, "schedule": "constant",
        "strategy": strategy, **changes,
    }  # fmt: skip
    data = DataConfig("digits", "test", crop=1, flip=True, cutout=2)
    recipe = Recipe((Rule(method=METHODS[method]),))
    return RunConfig(ModelConfig("digitsnet"), data, LoopConfig(**settings), recipe, out)


def outcome(result) -> dict[str, object]:
    """Weights, figures, histograms."""
    return {
        "weights": result.model.state_dict(),
        "histograms": result.histograms,
        "history": [
            (r.train_loss, r.train_top1, r.test_loss, r.test_top1, r.rounded_top1)
            for r in result.history
        ],
    }


def trained(folder: Path, group: Group) -> dict[str, object]:
    found = {}
    for strategy, method in CASES:
        out = folder / f"{strategy}-{method}" if group.leads else folder / "nobody"
        found[f"{strategy}-{method}"] = outcome(train(config(out, method, strategy), group=group))
    return found


def resumed(folder: Path, group: Group) -> dict[str, object]:
    """Runs whose first epoch one process has done."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        run = config(folder / f"alone-{strategy}", "lowres", strategy)
        found[strategy] = outcome(train(run, resume=True, group=group))
    return found


def begun(folder: Path, group: Group) -> None:
    """The first epoch of runs that one process goes on with."""
    for strategy in ("ddp", "fsdp"):
        out = folder / f"begun-{strategy}" if group.leads else folder / "nobody"
        train(config(out, "lowres", strategy, epochs=1), group=group)


def diverged(folder: Path, group: Group) -> str:
    """The error of a run whose loss is NaN in its second epoch, in this process alone."""
    before = loop.update

    def broken(state, x, y, *rest):
        if state.epoch == 1 and group.rank == 1:
            with torch.no_grad():
                state.model.features[0].parametrizations.weight.original.fill_(torch.nan)
        return before(state, x, y, *rest)

    loop.update = broken
    try:
        train(config(folder / "diverged", "lowres"), group=group)
    except SubbyteError as error:
        return str(error)
    finally:
        loop.update = before
    return ""


class Chained(nn.Module):
    """A convolution with a BatchNorm, a chain of two blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Linear(54, 54) for _ in range(2))
        self.head = nn.Linear(54, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.relu())


def network() -> nn.Module:
    torch.manual_seed(3)
    return Chained().eval()


def calibration() -> list[torch.Tensor]:
    return list((load_images("digits", "test").images[:299].float() / 255).split(64))


QUANTIZED = {
    "searched": sb.CoRa(target_bits=3.0, tune=10),
    "gptq": sb.CoRa(levels=4, tune=0),
}


def quantized(group: Group) -> dict[str, object]:
    found = {}
    for name, method in QUANTIZED.items():
        notes = Notes()
        done = sb.quantize(
            network(), method, calibration=calibration(), listener=notes, group=group
        )
        found[name] = (done.evidence.plan, done.layers, done.notes, done.evidence.distance)
    return found


class Notes:
    def note(self, text: str) -> None: ...
    def progress(self, step: str, done: int, total: int) -> None: ...


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined() as group:
        begun(folder, group)
        found = {
            "trained": trained(folder, group),
            "resumed": resumed(folder, group),
            "diverged": diverged(folder, group),
            "quantized": quantized(group),
            "parts": [group.own(n) for n in range(6)],
        }
    torch.save(found, folder / f"found-{group.rank}.pt")


if __name__ == "__main__":
    main()
