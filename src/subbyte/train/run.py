"""A whole run: train, freeze, pack, save, and score the file that was saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from subbyte import storage
from subbyte.core.group import ALONE, Group
from subbyte.data import load_images
from subbyte.errors import SubbyteError
from subbyte.methods import freeze, frozen_layers, quantizers
from subbyte.models import Network, build, load_weights
from subbyte.modules import pack
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.curves import save_curves
from subbyte.train.evaluate import Evaluation, evaluate
from subbyte.train.loop import TrainResult, train
from subbyte.train.modes import save_modes
from subbyte.train.progress import Progress, console_progress
from subbyte.train.settings import RunConfig
from subbyte.train.watch import far_from_levels

NETWORK = "net.safetensors"
WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
MODES = "modes.png"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    file: the packed network, or the float weights of a run without a recipe. trained: the score
    of the network in memory; saved: of the file, read back (in float32). n_bytes: the file's size.
    """

    file: Path
    n_bytes: int
    trained: Evaluation
    saved: Evaluation
    history: tuple[EpochRecord, ...]


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    fresh: bool = False,
    quiet: bool = False,
    group: Group = ALONE,
) -> RunResult:
    """Leaves the network, `curves.png`, `metrics.jsonl` and the checkpoint in `config.out`.

    resume, fresh, group: as in `train`; all processes of a group get the result.
    A method with soft weights leaves `modes.png` too, and a note if they end far from their levels.
    """
    progress = console_progress(quiet=quiet or not group.leads)
    result = train(config, resume=resume, fresh=fresh, progress=progress, group=group)
    return group.told(lambda: _left_behind(result, config, progress))


def _left_behind(result: TrainResult, config: RunConfig, progress: Progress) -> RunResult:
    file, net = _save(result, config)
    last = result.history[-1]
    far = None if last.rounded_top1 is None else far_from_levels(last.distance or 0.0)
    if far:
        progress.note(f"warning: {far}")
    test = load_images(
        config.data.source,
        config.data.test_split,
        size=config.data.size,
        unreadable=config.data.unreadable,
    )
    saved = evaluate(net, test, preprocess=result.model.preprocess)
    _plot(result, config, progress)
    return RunResult(file, file.stat().st_size, result.evaluation, saved, result.history)


def _save(result: TrainResult, config: RunConfig) -> tuple[Path, nn.Module]:
    """The file, and the network read back from it."""
    if config.recipe is None:
        return _save_float(result.model, config.out / WEIGHTS)
    path, last = config.out / NETWORK, result.history[-1]
    soft = last.rounded_top1 is not None
    net = pack(freeze(result.model), batchnorm=config.batchnorm)
    storage.save(net, path, compress=config.compress, distance=last.distance if soft else None)
    return path, storage.load(path, precision="float32")


def _save_float(model: Network, path: Path) -> tuple[Path, nn.Module]:
    storage.write_safetensors(model.state_dict(), {}, path)
    net = build(model.spec.name, **model.spec.arguments)
    load_weights(net, path)
    return path, net


def _plot(result: TrainResult, config: RunConfig, progress: Progress) -> None:
    """A run is not lost for want of a picture: what is missing becomes a note."""
    frozen = frozen_layers(result.model) if config.recipe else {}
    soft = [site.name for site, quantizer, _ in quantizers(result.model) if quantizer.soft]
    levels = {name: frozen[name].weight.grid.n_levels for name in soft}
    try:
        save_curves({config.out.name: result.history}, config.out / CURVES)
        if levels:
            save_modes(result.history, result.histograms, levels, config.out / MODES)
    except SubbyteError as error:
        progress.note(str(error))
