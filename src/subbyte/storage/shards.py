"""The tensors of a folder of `transformers`, in one file or in shards, each read when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from subbyte.errors import SubbyteError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """files: the file of each tensor. aliases: names in the network of tensors whose names in the
    files are others."""

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.aliases.get(name, name)]

    def read(self, name: str) -> Tensor:
        """The tensor of a name in the network, float32 where it is float."""
        own = self.aliases.get(name, name)
        with _opened(self.files[own]) as file:
            value: Tensor = file.get_tensor(own)
        return value.float() if value.is_floating_point() else value


def open_shards(folder: str | Path, model: nn.Module) -> Shards:
    """The tensors of a folder for a network of its class, which needs no memory.

    A checkpoint of a network with a head and one without differ by a prefix of their names, as
    `transformers` has it. Raises SubbyteError for a shard that is missing or damaged, a tensor that
    the index promises and its shard has not, that two shards have, that the network needs and
    none has, or that has another shape.
    """
    folder = Path(folder)
    files, shapes = _files(folder)
    shards = Shards(folder, files, shapes, _aliases(model, files))
    _check(shards, model)
    return shards


def _files(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    index = _index(folder)
    names = sorted(set(index.values())) if index else [SINGLE]
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in (folder / name for name in names):
        for name, shape in _shapes(path).items():
            if name in files:
                raise SubbyteError(f"{files[name]} and {path.name} both have a tensor '{name}'")
            files[name], shapes[name] = path, shape
    for name, file in index.items():
        if files.get(name) != folder / file:
            raise SubbyteError(f"{folder / INDEX} promises '{name}' in {file}, which has it not")
    return files, shapes


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> name of its file; empty for a folder with one file."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SubbyteError(f"{path} cannot be read: {error!r}") from None
    outside = next((file for file in index.values() if Path(file).name != file), None)
    if outside is not None or not index:
        raise SubbyteError(f"{path} names {outside!r}; expected names of files beside it")
    return index


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise SubbyteError(f"{path} is missing; the weights are read from safetensors, fetch it")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SubbyteError(f"{path}: not a whole safetensors file ({error})") from None


def _aliases(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """Names in the network -> in the files, where they differ by the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    held = set(files)
    found = {}
    for name in model.state_dict():
        for other in (prefix + name, name.removeprefix(prefix)):
            if name not in held and other in held and prefix != ".":
                found[name] = other
    return found


def _check(shards: Shards, model: nn.Module) -> None:
    """Every parameter has values, under one of its names, of its shape."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    for names in by_tensor.values():
        if not any(name in shards for name in names):
            raise SubbyteError(
                f"the files of {shards.folder} have no '{names[0]}', which "
                f"{type(model).__name__} needs (transformers may rename or merge what is stored)"
            )
    for name, value in model.state_dict().items():
        if name in shards and shards.shape(name) != tuple(value.shape):
            raise SubbyteError(
                f"'{name}' has shape {shards.shape(name)} in {shards.folder}, "
                f"{tuple(value.shape)} in {type(model).__name__}"
            )
