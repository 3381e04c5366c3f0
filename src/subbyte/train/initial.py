"""Weights to start a run from: float weights, a packed file, or the checkpoint of another run."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from subbyte import storage
from subbyte.core.sites import join, sites
from subbyte.errors import SubbyteError
from subbyte.models import load_state, load_weights
from subbyte.train.checkpoint import read_checkpoint

_PARAMETRIZED, _ORIGINAL = ".parametrizations.", ".original"


def load_initial(model: nn.Module, path: Path | str) -> None:
    """Fill a float network, in place.

    path: a safetensors file of float weights; a packed file, whose weights are decoded; or a
    `checkpoint.pt` of this loop (the averaged weights, if it has any). Raises SubbyteError for a
    file that is missing, damaged or of another network; then nothing is loaded.
    """
    path = Path(path)
    if path.suffix == ".pt" and path.is_file():
        load_state(model, _of_checkpoint(path), path)
    elif _is_packed(path):
        load_state(model, _of_packed(model, path), path)
    else:
        load_weights(model, path)


def _is_packed(path: Path) -> bool:
    """Whether a safetensors file has a manifest; what is no such file is left to `load_weights`."""
    try:
        with safe_open(path, framework="pt") as file:
            return storage.FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _of_packed(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The decoded weights of a packed file, in the float network's names."""
    packed = storage.read(path)
    if packed.affine:
        raise SubbyteError(
            f"{path}: its BatchNorms were absorbed, so it cannot be trained further; start from a "
            "file that was packed with batchnorm = 'keep', or from the run's checkpoint.pt"
        )
    state, parameters = packed.state(), {site.name: site for site in sites(model)}
    for name, layer in packed.layers().items():
        site = parameters.get(name)
        weight = layer.dequantize(0 if site is None else site.channel_axis)  # the adapter too
        state[join(site.owner, site.parameter) if site else name] = weight
        if layer.bias is not None:
            state[join(name, "bias")] = layer.bias
    return state


def _of_checkpoint(path: Path) -> dict[str, Tensor]:
    """The float weights of a checkpoint, without its quantizers."""
    content = read_checkpoint(path)
    averaged = content["ema"]
    state = content["model"] if averaged is None else _without_prefix(averaged)
    weights = {}
    for name, value in state.items():
        owner, prepared, rest = name.rpartition(_PARAMETRIZED)
        if not prepared:
            weights[name] = value
        elif rest.endswith(_ORIGINAL):
            weights[f"{owner}.{rest.removesuffix(_ORIGINAL)}"] = value
    return weights


def _without_prefix(averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged network's own names."""
    return {
        name.removeprefix("module."): value
        for name, value in averaged.items()
        if name.startswith("module.")
    }
