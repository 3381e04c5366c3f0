"""Options of the commands: type, form and what they do, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Json = Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")]
Wide = Annotated[bool, Option("--wide", help="Show every layer with every column.")]

# ---- networks and files
Model = Annotated[
    str | None,
    Option(
        metavar="PACKAGE.MODULE:FACTORY",
        help="The function that makes the float network; only a file without a program needs it.",
    ),
]
Convertible = Annotated[
    str,
    Argument(
        help="A network that ships, package.module:factory of your own, or a folder of "
        "transformers."
    ),
]
Target = Annotated[
    str,
    Argument(help="A packed file, a network that ships, or a folder of transformers."),
]
PackedFile = Annotated[Path, Argument(help="The packed file to look at.")]
Targets = Annotated[list[Path], Argument(help="Packed files, and folders of training runs.")]
Page = Annotated[Path, Option("--out", help="Where the page goes.")]
MaybeFile = Annotated[Path | None, Argument(help="The packed file to time.")]
Weights = Annotated[Path | None, Option(help="Float weights of the network, a .safetensors file.")]
Config = Annotated[Path, Argument(help="Configuration of the run, a TOML file; see examples/.")]
Out = Annotated[Path, Option(help="Where the packed file goes, or the packed folder.")]
Folder = Annotated[Path, Option(help="Folder that gets the files and the picture.")]
Compress = Annotated[bool, Option(help="Compress a layer's codes by zstd where that shrinks it.")]

# ---- data
Calibrate = Annotated[
    str,
    Option(
        help="What to calibrate on. Images: 'digits', a folder, or a hub id. For a folder of "
        "transformers: a text file."
    ),
]
Data = Annotated[
    str,
    Option(
        help="What to score. Images: 'digits', a folder, or a hub id. For a folder of "
        "transformers: a text file."
    ),
]
Task = Annotated[
    str | None,
    Option(
        help="What a folder of transformers is for: language (the text is one string of tokens) or "
        "embedding (every line is a sentence)."
    ),
]
Window = Annotated[int, Option(min=2, help="Tokens of one example of a language model.")]
Group = Annotated[
    int | None,
    Option(help="Inputs that share a scale, a multiple of 4. Without it: one scale per channel."),
]
Split = Annotated[str, Option(help="Split of the data to use.")]
Score = Annotated[str, Option(help="Split to score both networks on; '' for no score.")]
Size = Annotated[int | None, Option(min=1, help="Resize images to this side.")]
Samples = Annotated[
    int | None,
    Option(
        help="How many examples to calibrate on: 1600 images or sentences, or 64 windows of text, "
        "if not given."
    ),
]
Limit = Annotated[
    int | None,
    Option(min=1, help="Score only so many: the first images, or windows evenly spread."),
]

# ---- quantizing
Method = Annotated[str, Option(help="How to quantize: cora, cora-paper, gptq, rtn (nearest).")]
Bits = Annotated[int | None, Option(help="Give every layer 2^bits levels.")]
Levels = Annotated[int | None, Option(help="Give every layer this number of levels, 2 to 256.")]
TargetBits = Annotated[
    float | None,
    Option(
        help="Budget in bits per quantized weight, scales and adapters counted. Without --bits "
        "and --levels, levels and ranks of every layer are searched."
    ),
]
Seed = Annotated[int, Option(help="Seed of what is drawn: images, pseudo-labels, tuning.")]
Tune = Annotated[
    int | None,
    Option(help="Steps of tuning, 0 for none; if not given, the method's 250, by block none."),
]
ByBlock = Annotated[
    bool,
    Option(
        "--by-block",
        help="Of a folder larger than memory: read, quantize and free one block of the network "
        "after the other. Memory for one block and the hidden states of the calibration; a budget "
        "is met in each block, errors are not made up for from block to block, no tuning.",
    ),
]
AdapterBits = Annotated[int, Option(help="Bits of the adapters' factors, 8 or 16.")]
PlanFile = Annotated[Path | None, Option(help="Take levels and ranks from this file, no search.")]
SavePlan = Annotated[Path | None, Option(help="Write the plan to this file; --plan takes it.")]

# ---- files of other tools
ExportedFile = Annotated[Path, Argument(help="The packed file, or the packed folder, to export.")]
To = Annotated[
    Path, Option("--to", help="The file to write; its suffix says for which tool, as net.onnx.")
]
Form = Annotated[
    str,
    Option(help="small (the smallest file), fast (the fastest run) or auto (by the layers)."),
]
CalibrateRange = Annotated[
    str | None,
    Option(
        "--calibrate",
        help="Images that say how large activations get, for int8 convolutions: 'digits', a "
        "folder, or a hub id.",
    ),
]
RangeSamples = Annotated[int, Option(min=1, help="How many images of --calibrate to use.")]

# ---- running
Fresh = Annotated[bool, Option(help="Begin anew although the folder holds a run.")]
Resume = Annotated[bool, Option(help="Go on from the checkpoint in the folder `out`.")]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. train.epochs=2; repeatable."),
]
Precision = Annotated[
    str, Option(help="Precision of activations: auto (the fastest), int8, int16 or float32.")
]
Shapes = Annotated[
    str | None, Option(metavar="OUTxIN,...", help="Time random Linear layers of these sizes.")
]
ShapeLevels = Annotated[int, Option(help="Number of levels of --shapes, 2 to 256.")]
Input = Annotated[
    str | None,
    Option("--input", metavar="C,H,W", help="Size of an input, where the file leaves it open."),
]
Batch = Annotated[str, Option(metavar="N,...", help="Batch sizes to time.")]
Threads = Annotated[int | None, Option(help="Number of threads; by default as PyTorch has them.")]
Seconds = Annotated[float, Option(help="How long to measure, about.")]

# ---- experiments
Experiment = Annotated[str, Argument(help="Which experiment, as lowres/accuracy-by-levels.")]
Paper = Annotated[str, Argument(help="Which folder of experiments, as lowres or open.")]
Only = Annotated[
    str | None, Option("--only", metavar="VARIATION,...", help="Run only these variations.")
]
Seeds = Annotated[
    str | None, Option("--seeds", metavar="N,...", help="Run with these seeds, not the file's.")
]
DryRun = Annotated[bool, Option("--dry-run", help="Print what would run, and how long about.")]
Root = Annotated[Path, Option("--root", help="The folder of experiments.")]
Pages = Annotated[Path, Option("--out", help="The folder that gets the page and its pictures.")]
