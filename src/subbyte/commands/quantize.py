"""`subbyte quantize`: a network, its float weights and some images in; a packed file out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from subbyte import ptq, storage
from subbyte.commands import options as o
from subbyte.commands.converted import check_places, details, evidence_of, figures
from subbyte.commands.networks import float_network
from subbyte.commands.output import show
from subbyte.commands.pretrained import (
    NO_FOLDER,
    WINDOW,
    FolderRequest,
    check_plain_folder,
    convert_folder,
)
from subbyte.commands.pretrained import table as folder_table
from subbyte.core.group import ALONE, Group, joined
from subbyte.core.plan import Plan
from subbyte.core.quantized import Evidence, Quantized
from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.models import Network, Preprocess
from subbyte.modules import pack
from subbyte.ptq import CoRa, Listener, PublishedCoRa
from subbyte.report import size_report
from subbyte.storage.pretrained import is_folder
from subbyte.train import Evaluation, console_progress, evaluate
from subbyte.train.evaluate import preprocess_of

SAMPLES = 1600
_EXAMPLES = 2  # images that the network is traced with


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
    tune: o.Tune = None,
    adapter_bits: o.AdapterBits = 8,
    plan: o.PlanFile = None,
    save_plan: o.SavePlan = None,
    split: o.Split = "train",
    score: o.Score = "test",
    size: o.Size = None,
    compress: o.Compress = False,
    by_block: o.ByBlock = False,
    json_: o.Json = False,
) -> None:
    """Quantize a trained network with some examples and no labels; leaves a packed file.

    Several processes share the work: torchrun --nproc-per-node 2 -m subbyte quantize ...
    """
    with joined() as processes:
        if by_block:
            _check_by_block(model, tune, processes)
            tune = 0
        chosen = method_of(method, bits, levels, (target_bits, group), tune, adapter_bits)
        progress = console_progress(quiet=json_ or not processes.leads)
        if is_folder(model):
            own = {"--weights": weights, "--size": size, "--compress": compress or None}
            check_plain_folder(own)
            folder = FolderRequest(
                Path(model), task or "", Path(calibrate), out, window, samples, seed, plan,
                save_plan, by_block,
            )  # fmt: skip
            made = convert_folder(folder, chosen, progress, processes)
            if made is not None:
                show(made, folder_table, json_)
            return
        if task is not None:
            raise SubbyteError(NO_FOLDER.format(model))
        request = Request(
            model, calibrate, out, weights, SAMPLES if samples is None else samples, seed, split,
            score or None, size, compress, plan, save_plan,
        )  # fmt: skip
        found = convert(request, chosen, progress, processes)
        if found is not None:
            show(found, table, json_)


def _check_by_block(model: str, tune: int | None, processes: Group) -> None:
    if not is_folder(model):
        raise SubbyteError(f"--by-block goes with a folder of transformers, and {model} is none")
    if tune:
        raise SubbyteError(f"--tune {tune} needs the whole network; leave it out with --by-block")
    if not processes.alone:
        raise SubbyteError("--by-block is for one process; start it without torchrun")


@dataclass(frozen=True, slots=True)
class Request:
    """What to convert and how. model: a zoo name, or `package.module:factory`.

    calibrate: 'digits', a folder or a hub id; `samples` images of its training split are drawn with
    `seed`. score: the split that both networks are scored on, None for none.
    """

    model: str
    calibrate: str
    out: Path
    weights: Path | None = None
    samples: int = SAMPLES
    seed: int = 0
    split: str = "train"
    score: str | None = "test"
    size: int | None = None
    compress: bool = False
    plan: Path | None = None
    save_plan: Path | None = None


@dataclass(frozen=True)
class Conversion:
    """What came out. before and after: scores of the float network and of the file, read back.

    Both in float32 arithmetic: what the method did to the weights, and nothing else.
    """

    file: Path
    n_bytes: int
    quantized: Quantized
    before: Evaluation | None
    after: Evaluation | None

    @property
    def evidence(self) -> Evidence:
        return evidence_of(self.quantized)

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "bytes": self.n_bytes,
            **figures(self.quantized),
            "top1_float": None if self.before is None else self.before.top1,
            "top1": None if self.after is None else self.after.top1,
            **details(self.quantized),
        }


def convert(
    request: Request,
    method: CoRa | PublishedCoRa,
    listener: Listener | None = None,
    group: Group = ALONE,
) -> Conversion | None:
    """Quantize, save, read back, score. Raises SubbyteError for what a user can fix.

    group: processes that quantize together; one of them writes, and for the others this is None.
    """
    if group.leads:
        check_places(request.out, request.save_plan)
    with group.in_turn():
        images = load_images(request.calibrate, request.split, size=request.size)
    net = float_network(request.model, request.weights, images)
    preprocess = preprocess_of(net)
    plan = None if request.plan is None else Plan.load(request.plan)
    chosen = drawn(images, request.samples, request.seed)
    pairs = zip(chosen.images.split(256), chosen.labels.split(256), strict=True)
    inputs = [(preprocess(x), y) for x, y in pairs]
    result = ptq.quantize(
        net,
        method,
        calibration=inputs,
        plan=plan,
        seed=request.seed,
        listener=listener,
        group=group,
    )
    return _written(request, net, result, inputs[0][0], listener) if group.leads else None


def _written(
    request: Request, net: nn.Module, result: Quantized, inputs: Tensor, listener: Listener | None
) -> Conversion:
    """The files; then the scores of the float network and of what was written."""
    if request.save_plan is not None:
        evidence_of(result).plan.save(request.save_plan)
    n_bytes, notes = _save(net, result, request, inputs[:_EXAMPLES])
    if listener is not None:
        for note in notes:
            listener.note(note)
    result = replace(result, notes=(*result.notes, *notes))
    before = after = None
    if request.score is not None:
        preprocess = preprocess_of(net)
        test = load_images(request.calibrate, request.score, size=request.size)
        before = evaluate(net, test, preprocess=preprocess)
        skeleton = None if isinstance(net, Network) else net
        packed = storage.load(request.out, skeleton, precision="float32")
        after = evaluate(packed, test, preprocess=preprocess)
    return Conversion(request.out, n_bytes, result, before, after)


def _save(
    net: nn.Module, done: Quantized, request: Request, example: Tensor
) -> tuple[int, tuple[str, ...]]:
    """Write the file; its size in bytes, and notes on what it cannot be opened without.

    A network that ships is known by its name; any other opens by its program and its `preprocess`.
    """
    named = isinstance(net, Network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", storage.ProgramWarning)
        n_bytes = storage.save(
            pack(done), request.out, compress=request.compress, example=None if named else example
        )
    notes = [str(warning.message) for warning in caught]
    if not named and not notes and not isinstance(preprocess_of(net), Preprocess):
        notes = ["the file does not hold the network's preprocess, which is no Preprocess of ours"]
    return n_bytes, tuple(f"{note}; open {request.out} with --model" for note in notes)


def method_of(
    name: str,
    bits: int | None,
    levels: int | None,
    budget: tuple[float | None, int | None],
    tune: int | None,
    adapter_bits: int,
) -> CoRa | PublishedCoRa:
    """The method of a name, with the options that it takes. budget: target bits and group size.

    Raises SubbyteError for another name, and for an option that the method has no use for.
    """
    target_bits, group = budget
    if name == "cora":
        made = CoRa(levels, bits, target_bits, adapter_bits=adapter_bits, group=group)
        return made if tune is None else replace(made, tune=tune)
    if name in ("gptq", "rtn"):
        if target_bits is not None:
            raise SubbyteError(f"--target-bits goes with --method cora; {name} has no adapters")
        return CoRa(levels, bits, codes=name, tune=0, correct_norms=False, group=group)
    if name == "cora-paper":
        if levels is not None or target_bits is not None or bits is None:
            raise SubbyteError("--method cora-paper takes --bits, and no levels or target bits")
        if group is not None:
            raise SubbyteError("--method cora-paper has one scale per tensor, and no --group")
        return PublishedCoRa(bits, adapter_bits=adapter_bits)
    raise SubbyteError(f"--method {name}: expected one of cora, cora-paper, gptq, rtn")


def drawn(images: ImageSet, samples: int, seed: int) -> ImageSet:
    """So many images at random (all, if there are fewer), in the order of the set."""
    if samples < 1:
        raise SubbyteError(f"samples={samples}; give 1 or more calibration images")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(images), generator=generator)[:samples]
    return images.subset(index.sort().values)


def table(result: Conversion) -> Table:
    """The result for people."""
    q, evidence = result.quantized, result.evidence
    sizes = size_report(result.file)
    view = Table(title=escape(str(result.file)))
    for heading in (
        "bits per weight",
        "in quantized layers",
        "bytes",
        "smaller",
        "seconds",
        "iterations",
        "agreement",
    ):
        view.add_column(heading, justify="right")
    row = [
        f"{q.bits_per_weight:.3f}",
        f"{q.layer_bits_per_weight:.3f}",
        f"{result.n_bytes:,}",
        f"{sizes.reduction:.1f}x",
        f"{evidence.seconds:.0f}",
        str(evidence.iterations),
        "" if evidence.agreement is None else f"{evidence.agreement:.2f} %",
    ]
    if result.before is not None and result.after is not None:
        view.add_column("float top-1", justify="right")
        view.add_column("top-1", justify="right")
        row += [f"{result.before.top1:.2f} %", f"{result.after.top1:.2f} %"]
    view.add_row(*row)
    return view
