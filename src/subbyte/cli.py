"""The command line: a thin layer over the library.

What a user can fix ends in one line on stderr and exit code 2; results go to stdout, progress to
stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

from subbyte.bench import bench as measure
from subbyte.bench import from_network, from_shapes, parse_numbers, parse_shapes
from subbyte.bench import table as bench_table
from subbyte.commands.demo import run_demo
from subbyte.commands.demo import table as demo_table
from subbyte.commands.networks import float_network, packed_network
from subbyte.commands.quantize import SAMPLES, Request, convert, method_of
from subbyte.commands.quantize import table as conversion_table
from subbyte.core.jsontext import to_json
from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.models import NETWORKS
from subbyte.report import size_report
from subbyte.report import table as size_table
from subbyte.train import console_progress, run
from subbyte.train import evaluate as score
from subbyte.train.config import read_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural networks at 1 to 4 bits a weight: train them, convert them, run them.",
)

Model = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:FACTORY",
        help="The function that makes the float network, for a file of one of your own.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def main() -> None:
    """Entry point of the `subbyte` command."""
    try:
        app()
    except (SubbyteError, OSError) as error:  # OSError: a folder in the way, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files and the picture.")] = Path(
        "runs/demo"
    ),
    json_: Json = False,
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
    config: Annotated[Path, typer.Argument(help="TOML file; see examples/.")],
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint in `out`.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. train.epochs=2."),
    ] = None,
    json_: Json = False,
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
    model: Annotated[str, typer.Argument(help="A zoo network, or package.module:factory.")],
    calibrate: Annotated[str, typer.Option(help="'digits', a folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The packed file to write.")],
    weights: Annotated[Path | None, typer.Option(help="Its float weights (.safetensors).")] = None,
    method: Annotated[str, typer.Option(help="cora, cora-paper, gptq or rtn.")] = "cora",
    bits: Annotated[int | None, typer.Option(help="2^bits levels in every layer.")] = None,
    levels: Annotated[int | None, typer.Option(help="Levels in every layer, 2 to 256.")] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Budget in real bits a weight; alone, levels and ranks are searched."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration images.")] = SAMPLES,
    seed: Annotated[int, typer.Option(help="Of the images, pseudo-labels and tuning.")] = 0,
    tune: Annotated[int, typer.Option(help="Tuning iterations, 0 to 250.")] = 250,
    adapter_bits: Annotated[int, typer.Option(help="8 or 16, of adapters.")] = 8,
    plan: Annotated[
        Path | None, typer.Option(help="Levels and ranks from this file; no search.")
    ] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    split: Annotated[str, typer.Option(help="Split to calibrate on.")] = "train",
    score: Annotated[str, typer.Option(help="Split to score on, '' for none.")] = "test",
    size: Annotated[int | None, typer.Option(min=1, help="Resize images so far.")] = None,
    compress: Annotated[bool, typer.Option(help="zstd where it shrinks a layer.")] = False,
    json_: Json = False,
) -> None:
    """Quantize a trained network with some images and no labels; leaves a packed file."""
    request = Request(
        model, calibrate, out, weights, samples, seed, split, score or None, size, compress,
        plan, save_plan,
    )  # fmt: skip
    chosen = method_of(method, bits, levels, target_bits, tune, adapter_bits)
    result = convert(request, chosen, console_progress(quiet=json_))
    if json_:
        _print_json(result.to_dict())
        return
    _console().print(conversion_table(result))


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A packed file, or the name of a zoo network.")],
    data: Annotated[str, typer.Option(help="'digits', a folder, or a hub id.")],
    weights: Annotated[
        Path | None, typer.Option(help="Float weights (.safetensors) of the zoo network.")
    ] = None,
    model: Model = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    size: Annotated[
        int | None, typer.Option(min=1, help="Resize images so far, as data.size in training.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many images only.")] = None,
    precision: Annotated[
        str, typer.Option(help="Of a packed file's activations: int8, int16 or float32.")
    ] = "int8",
    json_: Json = False,
) -> None:
    """Top-1 accuracy and loss of a packed file, or of a zoo network with float weights."""
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
    file: Annotated[Path, typer.Argument(help="A packed file.")], json_: Json = False
) -> None:
    """Bits, bytes, entropy, level shares and scales of a packed file, a layer at a time."""
    report = size_report(file)
    if json_:
        _print_json(report.to_dict())
        return
    _console().print(size_table(report))


@app.command()
def bench(
    file: Annotated[Path | None, typer.Argument(help="A packed file.")] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="OUTxIN,...", help="Random Linear layers instead.")
    ] = None,
    levels: Annotated[int, typer.Option(help="Of --shapes, 2 to 256.")] = 3,
    model: Model = None,
    input_: Annotated[
        str | None,
        typer.Option("--input", metavar="C,H,W", help="Input size, where FILE leaves it open."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1",
    precision: Annotated[str, typer.Option(help="int8, int16 or float32.")] = "int8",
    threads: Annotated[int | None, typer.Option(help="As PyTorch has them by default.")] = None,
    seconds: Annotated[float, typer.Option(help="About how long to measure.")] = 20.0,
    json_: Json = False,
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


def _console() -> Console:
    """Tables as wide as the terminal; 140 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
