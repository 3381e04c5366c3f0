"""The command line: a thin layer over the library.

What a user can fix ends in one line on stderr and exit code 2; results go to stdout, progress to
stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from torch import nn

from subbyte.bench import bench as measure
from subbyte.bench import from_network, from_shapes, parse_numbers, parse_shapes
from subbyte.bench import table as bench_table
from subbyte.commands import options as o
from subbyte.commands.demo import run_demo
from subbyte.commands.demo import table as demo_table
from subbyte.commands.networks import float_network, packed_network
from subbyte.commands.pretrained import (
    NO_FOLDER,
    WINDOW,
    FolderRequest,
    check_plain_folder,
    convert_folder,
    evaluate_folder,
)
from subbyte.commands.pretrained import table as folder_table
from subbyte.commands.quantize import SAMPLES, Request, convert, method_of
from subbyte.commands.quantize import table as conversion_table
from subbyte.core.jsontext import to_json
from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.models import NETWORKS
from subbyte.report import size_report, size_text
from subbyte.storage.pretrained import PACKED, is_folder
from subbyte.train import console_progress, run
from subbyte.train import evaluate as score
from subbyte.train.config import read_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural networks at 1 to 4 bits per weight: train them, convert them, run them.",
)


def main() -> None:
    """Entry point of the `subbyte` command."""
    try:
        app()
    except (SubbyteError, OSError) as error:  # OSError: a folder in the way, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def demo(
    out: o.Folder = Path("runs/demo"),
    json_: o.Json = False,
) -> None:
    """Train float32, 5-level and 3-level versions of a small ConvNet; pack, reload, compare."""
    result = run_demo(out, quiet=json_)
    if json_:
        _print_json(result.to_dict())
        return
    _console().print(demo_table(result))
    print(f"picture: {result.picture}")


@app.command()
def train(
    config: o.Config,
    resume: o.Resume = False,
    set_: o.Set = None,
    json_: o.Json = False,
) -> None:
    """Train from a config; leaves the packed network, metrics, curves and a checkpoint in `out`."""
    result = run(read_config(config, _overrides(set_ or [])), resume=resume, quiet=json_)
    if json_:
        _print_json(
            {
                "file": str(result.file),
                "bytes": result.n_bytes,
                **asdict(result.saved),
                "trained": asdict(result.trained),
                "history": [asdict(record) for record in result.history],
            }
        )
        return
    print(
        f"{result.file}: {result.n_bytes:,} bytes, top-1 {result.saved.top1:.2f} % of "
        f"{result.saved.n:,} images (read back from the file; in training "
        f"{result.trained.top1:.2f} %)"
    )


@app.command()
def quantize(
    model: o.Convertible,
    calibrate: o.Calibrate,
    out: o.Out,
    weights: o.Weights = None,
    method: o.Method = "cora",
    bits: o.Bits = None,
    levels: o.Levels = None,
    target_bits: o.TargetBits = None,
    group: o.Group = None,
    task: o.Task = None,
    window: o.Window = WINDOW,
    samples: o.Samples = None,
    seed: o.Seed = 0,
    tune: o.Tune = 250,
    adapter_bits: o.AdapterBits = 8,
    plan: o.PlanFile = None,
    save_plan: o.SavePlan = None,
    split: o.Split = "train",
    score: o.Score = "test",
    size: o.Size = None,
    compress: o.Compress = False,
    json_: o.Json = False,
) -> None:
    """Quantize a trained network with some examples and no labels; leaves a packed file."""
    chosen = method_of(method, bits, levels, (target_bits, group), tune, adapter_bits)
    if is_folder(model):
        check_plain_folder({"--weights": weights, "--size": size, "--compress": compress or None})
        _quantize_folder(
            FolderRequest(Path(model), task or "", Path(calibrate), out, window, samples, seed,
                          plan, save_plan),
            chosen, json_,
        )  # fmt: skip
        return
    if task is not None:
        raise SubbyteError(NO_FOLDER.format(model))
    request = Request(
        model, calibrate, out, weights, SAMPLES if samples is None else samples, seed, split,
        score or None, size, compress, plan, save_plan,
    )  # fmt: skip
    result = convert(request, chosen, console_progress(quiet=json_))
    if json_:
        _print_json(result.to_dict())
        return
    _console().print(conversion_table(result))


def _quantize_folder(request: FolderRequest, chosen: Any, json_: bool) -> None:
    result = convert_folder(request, chosen, console_progress(quiet=json_))
    if json_:
        _print_json(result.to_dict())
        return
    _console().print(folder_table(result))


@app.command()
def evaluate(
    target: o.Target,
    data: o.Data,
    weights: o.Weights = None,
    model: o.Model = None,
    split: o.Split = "test",
    size: o.Size = None,
    limit: o.Limit = None,
    task: o.Task = None,
    window: o.Window = WINDOW,
    precision: o.Precision = "int8",
    json_: o.Json = False,
) -> None:
    """The score of a network: top-1 on images, or perplexity of a language model on a text."""
    if is_folder(target):
        check_plain_folder({"--weights": weights, "--size": size, "--model": model})
        found = evaluate_folder(
            Path(target), Path(data), task or "", window=window, limit=limit, precision=precision
        )
        if json_:
            _print_json({"target": target, "data": data, **asdict(found)})
            return
        print(f"{target} on {data}: {found.measure} {found.value:.3f} of {found.n:,} tokens")
        return
    if task is not None:
        raise SubbyteError(NO_FOLDER.format(target))
    if target not in NETWORKS and not Path(target).exists():
        raise SubbyteError(
            f"'{target}' is neither a file nor a zoo network; networks: {', '.join(NETWORKS)}"
        )
    images = load_images(data, split, size=size)
    images = images if limit is None else images.head(limit)
    result = score(_network(target, model, weights, images, precision), images)
    if json_:
        _print_json({"target": target, "data": data, "split": images.split, **asdict(result)})
        return
    print(
        f"{target} on {data} ({images.split}): top-1 {result.top1:.2f} % of {result.n:,} images, "
        f"loss {result.loss:.4f}"
    )


@app.command("inspect")
def inspect_file(
    file: o.PackedFile,
    wide: o.Wide = False,
    json_: o.Json = False,
) -> None:
    """Bits, bytes, entropy and scales of a packed file, per layer; alike layers are one row."""
    report = size_report(file / PACKED if is_folder(file) else file)
    if json_:
        _print_json(report.to_dict())
        return
    print(size_text(report, _console(100).width, wide=wide))


@app.command()
def bench(
    file: o.MaybeFile = None,
    shapes: o.Shapes = None,
    levels: o.ShapeLevels = 3,
    model: o.Model = None,
    input_: o.Input = None,
    batch: o.Batch = "1",
    precision: o.Precision = "int8",
    threads: o.Threads = None,
    seconds: o.Seconds = 20.0,
    json_: o.Json = False,
) -> None:
    """Time packed layers on this machine, against float32 and against what the machine can do."""
    if (file is None) == (shapes is None):
        raise SubbyteError("bench takes a packed file or --shapes OUTxIN, one of the two")
    batches = parse_numbers("--batch", batch)
    kind: Any = precision
    if shapes is not None:
        if input_ is not None or model is not None:
            raise SubbyteError(
                "--input and --model go with a packed file; --shapes says how wide layers are"
            )
        net, example = from_shapes(parse_shapes(shapes), levels, kind)
        name = f"Linear layers of {levels} levels"
    else:
        assert file is not None
        size = None if input_ is None else parse_numbers("--input", input_)
        net, example = from_network(packed_network(file, model, kind), str(file), size)
        name = str(file)
    report = measure(net, example, target=name, batches=batches, threads=threads, seconds=seconds,
                     whole=shapes is None)  # fmt: skip
    if json_:
        _print_json(report.to_dict())
        return
    _console().print(bench_table(report))


def _network(
    target: str, model: str | None, weights: Path | None, images: ImageSet, precision: Any
) -> nn.Module:
    """A packed file, or a zoo network (a name wins over a file) that fits the images."""
    if target not in NETWORKS:
        if weights is not None:
            raise SubbyteError(f"{target} is a file; --weights goes with the name of a network")
        return packed_network(target, model, precision)
    if model is not None:
        raise SubbyteError(f"--model goes with a packed file; {target} is a zoo network")
    return float_network(target, weights, images)


def _overrides(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise SubbyteError(f"--set {pair}: expected KEY=VALUE, for instance train.epochs=2")
    return dict(pair.split("=", 1) for pair in pairs)  # type: ignore[misc]


def _print_json(value: dict[str, Any]) -> None:
    print(to_json(value))


def _console(otherwise: int = 140) -> Console:
    """As wide as the terminal, or as COLUMNS says; `otherwise` columns where there is neither."""
    console = Console()
    follows = console.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    return console if follows else Console(width=otherwise)
