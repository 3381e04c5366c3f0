"""`subbyte quantize` and `subbyte evaluate` for folders of `transformers` and a text file.

Language: the text is one string of tokens, cut into windows without overlap. Embedding: every
line of the text is a sentence.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from subbyte.commands.converted import check_places, details, evidence_of, figures
from subbyte.core.group import ALONE, Group
from subbyte.core.plan import Plan
from subbyte.core.quantized import Evidence, Quantized
from subbyte.errors import SubbyteError
from subbyte.modules import pack
from subbyte.ptq import CoRa, Listener, PublishedCoRa, quantize, quantize_folder
from subbyte.storage.opening import load
from subbyte.storage.pretrained import PACKED, float_model, save_pretrained, tokenizer_of
from subbyte.tasks import Score, Task, evaluate, task_named

WINDOW = 512
NO_FOLDER = (
    "--task goes with a folder of transformers, and {} is none: it has no config.json and no .gguf"
)
SAMPLES = {"language": 64, "embedding": 1600}
_BATCH = 32


@dataclass(frozen=True, slots=True)
class FolderRequest:
    """What to convert and how.

    task: 'language' or 'embedding'. calibrate: a text file. window: tokens of one example of
    language. samples: windows or sentences, None for SAMPLES of the task. by_block: see
    `quantize_folder`.
    """

    folder: Path
    task: str
    calibrate: Path
    out: Path
    window: int = WINDOW
    samples: int | None = None
    seed: int = 0
    plan: Path | None = None
    save_plan: Path | None = None
    by_block: bool = False


@dataclass(frozen=True)
class FolderConversion:
    """What came out. peak_bytes: the most memory that the process has held."""

    folder: Path
    n_bytes: int
    quantized: Quantized
    peak_bytes: int

    @property
    def evidence(self) -> Evidence:
        return evidence_of(self.quantized)

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "bytes": self.n_bytes,
            **figures(self.quantized),
            "peak_bytes": self.peak_bytes,
            **details(self.quantized),
        }


def convert_folder(
    request: FolderRequest,
    method: CoRa | PublishedCoRa,
    listener: Listener | None = None,
    group: Group = ALONE,
) -> FolderConversion | None:
    """Quantize a folder of `transformers` and write the packed one.

    group: processes that quantize together; one of them writes, and for the others this is None.
    """
    task = _task(request.task)
    if group.leads:
        check_places(request.out / PACKED, request.save_plan)
    plan = None if request.plan is None else Plan.load(request.plan)
    text = _text(request.calibrate)
    tokenizer = tokenizer_of(request.folder)
    samples = SAMPLES[task.name] if request.samples is None else request.samples
    if samples < 1:
        raise SubbyteError(f"samples={samples}; give 1 or more calibration examples")
    if task.name == "language":
        examples = evenly(windows(text, tokenizer, request.window), samples)
        batches: list[Any] = [{"input_ids": examples}]
    else:
        batches = list(sentences(text.splitlines(), tokenizer, samples, request.seed))
    options: dict[str, Any] = {
        "calibration": batches, "task": task, "plan": plan, "seed": request.seed,
        "listener": listener,
    }  # fmt: skip
    if request.by_block:
        done = quantize_folder(request.folder, method, **options)
    else:
        done = quantize(float_model(request.folder), method, **options, group=group)
    if not group.leads:
        return None
    if request.save_plan is not None:
        evidence_of(done).plan.save(request.save_plan)
    n_bytes = save_pretrained(pack(done), request.folder, request.out)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return FolderConversion(request.out, n_bytes, done, peak)


def evaluate_folder(
    folder: Path, data: Path, task: str, *, window: int = WINDOW, limit: int | None = None,
    precision: Any = "auto",
) -> Score:  # fmt: skip
    """The perplexity of a language model, packed or float, on a text file.

    limit: so many windows, spread evenly over the text; None for all.
    """
    found = _task(task)
    if found.name != "language":
        raise SubbyteError(
            f"--task {task} has no score on a plain text; use subbyte.tasks.evaluate with pairs"
        )
    tokens = windows(_text(data), tokenizer_of(folder), window)
    if limit is not None:
        tokens = evenly(tokens, limit)
    packed = (folder / PACKED).is_file()
    model = load(folder, precision=precision) if packed else float_model(folder)
    pairs = (({"input_ids": own}, None) for own in tokens.split(max(1, 2048 // window)))
    return evaluate(model, pairs, found)


def check_plain_folder(given: Mapping[str, Any]) -> None:
    """Raises SubbyteError for options that say nothing about a folder of transformers."""
    for option, value in given.items():
        if value is not None:
            raise SubbyteError(f"{option} does not go with a folder of transformers; leave it out")


def windows(text: str, tokenizer: Any, window: int) -> Tensor:
    """The tokens of the text as int64 [n, window], without overlap; what is over is left out."""
    if window < 2:
        raise SubbyteError(f"window={window}; give 2 tokens or more")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < window:
        raise SubbyteError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give a longer "
            "text or a smaller --window"
        )
    return ids[: len(ids) // window * window].reshape(-1, window)


def sentences(
    lines: Iterable[str], tokenizer: Any, samples: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of padded sentences, of like length; `samples` of the lines that hold text."""
    known = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not known:
        raise SubbyteError("the text has no line with a sentence")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    chosen = sorted((known[i] for i in order[:samples].tolist()), key=len)
    for start in range(0, len(chosen), _BATCH):
        made = tokenizer(
            chosen[start : start + _BATCH], padding=True, truncation=True, return_tensors="pt"
        )
        yield dict(made)


def table(result: FolderConversion) -> Table:
    """The result for people."""
    q, evidence = result.quantized, result.evidence
    agreement = "" if evidence.agreement is None else f"{evidence.agreement:.2f} %"
    columns = {
        "bits per weight": f"{q.bits_per_weight:.3f}",
        "in quantized layers": f"{q.layer_bits_per_weight:.3f}",
        "bytes": f"{result.n_bytes:,}",
        "seconds": f"{evidence.seconds:.0f}",
        "peak memory": f"{result.peak_bytes / 1e9:.2f} GB",
        "distance": f"{evidence.distance:.4f}",
        "agreement": agreement,
    }
    view = Table(title=escape(str(result.folder)))
    for heading in columns:
        view.add_column(heading, justify="right")
    view.add_row(*columns.values())
    return view


def _task(name: str) -> Task:
    if not name:
        raise SubbyteError(f"a folder of transformers needs --task: say {' or '.join(SAMPLES)}")
    if name not in SAMPLES:
        raise SubbyteError(
            f"--task {name}: a folder and a text are for {' or '.join(SAMPLES)}; for another task "
            "call subbyte.quantize"
        )
    return task_named(name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SubbyteError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise SubbyteError(f"{path}: is no UTF-8 text ({error.reason})") from None


def evenly(examples: Tensor, n: int) -> Tensor:
    """n examples evenly over all of them; all, if there are fewer."""
    if n >= len(examples):
        return examples
    return examples[torch.linspace(0, len(examples) - 1, n).long()]
