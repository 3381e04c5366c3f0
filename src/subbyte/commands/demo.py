"""The whole road on embedded data: train, freeze, pack, save, load, compare; about a minute.

At its end the C++ runtime runs the last file, in a process without PyTorch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subbyte import storage
from subbyte.commands import options as o
from subbyte.commands.apart import run_without_torch
from subbyte.commands.output import console, print_json
from subbyte.core.recipe import Recipe, Rule
from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.methods import LowRes, float_state_dict, freeze, frozen_layers
from subbyte.models import Network
from subbyte.modules import pack
from subbyte.report import size_report
from subbyte.report.plots import Histogram, plot_demo
from subbyte.train import (
    DataConfig,
    EpochRecord,
    LoopConfig,
    ModelConfig,
    RunConfig,
    console_progress,
    evaluate,
    train,
)

SHOWN_LAYER = "features.7"  # its histogram goes into the picture
OTHER_CLASSES = 0.01  # of the images, at most, get another class from the runtime
LOGIT_TOLERANCE = 1e-4  # of the largest logit: a summation order apart, no more

BASE = RunConfig(
    ModelConfig("digitsnet"),
    DataConfig("digits"),
    LoopConfig(epochs=8, batch_size=64, lr=0.05, weight_decay=1e-4, nesterov=True),
)


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One version of the network. layer_bytes: its weights, codes and scales on disk."""

    name: str
    top1: float
    top1_of_file: float
    layer_bytes: int
    file_bytes: int
    bits_per_weight: float
    reduction: float
    largest_logit_difference: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """without_torch_us: microseconds an image of the runtime, on one thread."""

    rows: tuple[DemoRow, ...]
    picture: Path
    without_torch_us: float

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {
            "rows": rows,
            "picture": str(self.picture),
            "without_torch_us": self.without_torch_us,
        }


@dataclass(frozen=True, slots=True)
class _Version:
    row: DemoRow
    history: tuple[EpochRecord, ...]
    histogram: Histogram | None


def demo(
    out: o.Folder = Path("runs/demo"),
    json_: o.Json = False,
) -> None:
    """Train float32, 5-level and 3-level versions of a small ConvNet; pack, reload, compare."""
    result = run_demo(out, quiet=json_)
    if json_:
        print_json(result.to_dict())
        return
    console().print(table(result))
    print(f"picture: {result.picture}")
    print(
        "the same file in a process without PyTorch, by the C++ runtime: the same classes, "
        f"{result.without_torch_us:.1f} us an image on one thread"
    )


def run_demo(out: Path, *, quiet: bool = False) -> DemoResult:
    """Three versions of one network on the digits; leaves their files and a picture in `out`.

    Raises SubbyteError if a file and the network that was trained disagree.
    """
    versions = [
        _version("float32", None, out, quiet),
        _version("5 levels", LowRes(levels=5), out, quiet),
        _version("3 levels", LowRes(levels=3), out, quiet),
    ]
    picture = out / "demo.png"
    plot_demo(
        {version.row.name: version.history for version in versions},
        [version.histogram for version in versions if version.histogram is not None],
        picture,
    )
    last = out / "3-levels" / "net.safetensors"
    return DemoResult(tuple(version.row for version in versions), picture, _without_torch(last))


def _version(name: str, method: LowRes | None, out: Path, quiet: bool) -> _Version:
    recipe = None if method is None else Recipe((Rule(method=method),))
    config = replace(BASE, recipe=recipe, out=out / name.replace(" ", "-"))
    progress = console_progress(quiet=quiet)
    progress.note(f"{name}:")
    result = train(config, progress=progress)
    test = load_images(config.data.source, config.data.test_split)
    if method is None:
        row = _float_row(name, result.model, test, config.out / "weights.safetensors")
        return _Version(row, result.history, None)
    row = _packed_row(name, result.model, test, config.out / "net.safetensors")
    return _Version(row, result.history, _histogram(name, result.model))


def _float_row(name: str, model: Network, test: ImageSet, path: Path) -> DemoRow:
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    n_bytes = storage.write_safetensors(state, {}, path)
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    top1 = evaluate(model, test).top1
    return DemoRow(name, top1, top1, 4 * weights, n_bytes, 32.0, 1.0, 0.0)


def _packed_row(name: str, model: Network, test: ImageSet, path: Path) -> DemoRow:
    example = model.preprocess(test.images[:2])
    storage.save(pack(freeze(model)), path, example=example)
    net, sizes = storage.load(path, precision="float32"), size_report(path)
    difference = _largest_difference(model, net, test)
    return DemoRow(
        name,
        evaluate(model, test).top1,
        evaluate(net, test).top1,
        sizes.disk_bytes,
        sizes.file_bytes,
        8 * sizes.disk_bytes / sizes.n_weights,
        sizes.reduction,
        difference,
    )


@torch.no_grad()
def _without_torch(path: Path) -> float:
    """Microseconds an image. Raises SubbyteError if the classes are not those of PyTorch.

    A few may be: where a norm's last bit differs, an activation is rounded the other way.
    """
    net: Any = storage.load(path)
    x = net.preprocess(load_images(BASE.data.source, BASE.data.test_split).images)
    found = run_without_torch(path, x.numpy())
    others = int((found.values.argmax(1) != net(x).argmax(1).numpy()).sum())
    if others > OTHER_CLASSES * len(x):
        raise SubbyteError(f"{path}: the runtime gives other classes to {others} images")
    return found.seconds / len(x) * 1e6


def _largest_difference(model: Network, net: nn.Module, test: ImageSet) -> float:
    """Of the logits of the trained network and of its file. Raises SubbyteError if they differ."""
    trained, packed = _logits(model, model, test), _logits(net, model, test)
    difference = float((trained - packed).abs().max())
    if not difference <= LOGIT_TOLERANCE * float(trained.abs().max()):
        raise SubbyteError(f"the packed file's logits differ from training by {difference:.3g}")
    return difference


@torch.no_grad()
def _logits(net: nn.Module, preprocess_of: Network, test: ImageSet) -> Tensor:
    net.eval()
    with parametrize.cached():
        logits: Tensor = net(preprocess_of.preprocess(test.images))
    return logits


def _histogram(name: str, model: Network) -> Histogram:
    """Float weights of one layer in units of its scale, and the shares of its levels."""
    weight = frozen_layers(model)[SHOWN_LAYER].weight
    w = float_state_dict(model)[f"{SHOWN_LAYER}.weight"] / weight.scale
    return Histogram(name, SHOWN_LAYER, w.flatten(), weight)


def table(result: DemoResult) -> Table:
    """The rows for people."""
    view = Table(title="digits, one ConvNet, three weight grids")
    view.add_column("weights")
    for heading in ("top-1 %", "top-1 % of file", "bytes of weights", "bits per weight",
                    "reduction", "file bytes", "largest logit difference"):  # fmt: skip
        view.add_column(heading, justify="right")
    for row in result.rows:
        view.add_row(
            row.name,
            f"{row.top1:.2f}",
            f"{row.top1_of_file:.2f}",
            f"{row.layer_bytes:,}",
            f"{row.bits_per_weight:.3f}",
            f"{row.reduction:.1f}x",
            f"{row.file_bytes:,}",
            f"{row.largest_logit_difference:.1e}",
        )
    return view
