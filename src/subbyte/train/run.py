"""A whole run: train, freeze, pack, save, and score the file that was saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from subbyte import artifact
from subbyte.data import load_images
from subbyte.errors import SubbyteError
from subbyte.methods import freeze
from subbyte.models import Network, build, load_weights
from subbyte.modules import pack
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.curves import Histories, save_curves
from subbyte.train.evaluate import Evaluation, evaluate
from subbyte.train.loop import train
from subbyte.train.progress import Progress, console_progress
from subbyte.train.settings import RunConfig

NETWORK = "net.safetensors"
WEIGHTS = "weights.safetensors"
CURVES = "curves.png"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    file: the packed network, or the float weights of a run without a recipe. trained: the score
    of the network in memory; saved: of the file, read back. n_bytes: the file's size.
    """

    file: Path
    n_bytes: int
    trained: Evaluation
    saved: Evaluation
    history: tuple[EpochRecord, ...]


def run(config: RunConfig, *, resume: bool = False, quiet: bool = False) -> RunResult:
    """Leaves the network, `curves.png`, `metrics.jsonl` and the checkpoint in `config.out`."""
    progress = console_progress(quiet=quiet)
    result = train(config, resume=resume, progress=progress)
    file, net = _save(result.model, config)
    test = load_images(config.data.source, config.data.test_split, size=config.data.size)
    saved = evaluate(net, test, preprocess=result.model.preprocess)
    _plot({config.out.name: result.history}, config.out / CURVES, progress)
    return RunResult(file, file.stat().st_size, result.evaluation, saved, result.history)


def _save(model: Network, config: RunConfig) -> tuple[Path, nn.Module]:
    """The file, and the network read back from it."""
    if config.recipe is None:
        return _save_float(model, config.out / WEIGHTS)
    path = config.out / NETWORK
    artifact.save(pack(model, freeze(model)), path, compress=config.compress)
    return path, artifact.load(path)


def _save_float(model: Network, path: Path) -> tuple[Path, nn.Module]:
    artifact.write_safetensors(model.state_dict(), {}, path)
    net = build(model.spec.name, **model.spec.arguments)
    load_weights(net, path)
    return path, net


def _plot(histories: Histories, path: Path, progress: Progress) -> None:
    """A run is not lost for want of a picture: what is missing becomes a note."""
    try:
        save_curves(histories, path)
    except SubbyteError as error:
        progress.note(str(error))
