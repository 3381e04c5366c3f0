"""Networks by name on the command line: the zoo's, one's own, and those in packed files."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subbyte import storage
from subbyte.data import ImageSet
from subbyte.errors import SubbyteError
from subbyte.models import NETWORKS, build, load_weights


def float_network(name: str, weights: Path | None, images: ImageSet) -> nn.Module:
    """The trained network of a name, which is of the zoo or `package.module:factory`."""
    if ":" in name:
        net = from_factory(name)
        if weights is not None:
            load_weights(net, weights)
        return net.eval()
    if name not in NETWORKS:
        raise SubbyteError(
            f"'{name}' is neither a zoo network nor 'package.module:factory'; networks: "
            f"{', '.join(NETWORKS)}"
        )
    if weights is None:
        raise SubbyteError(f"network '{name}' needs its float weights: --weights FILE")
    net = build(name, **arguments_for(name, images))
    load_weights(net, weights)
    return net.eval()


def from_factory(name: str) -> nn.Module:
    """What `package.module:factory` returns, called with nothing; the current folder counts too.

    Raises SubbyteError for a module that cannot be imported, a factory that fails (its own words in
    one line, with the place), and what is no network.
    """
    module_name, _, factory_name = name.partition(":")
    try:
        with _current_folder():
            factory = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise SubbyteError(f"'{name}' cannot be imported: {_in_one_line(error)}") from None
    if not callable(factory):
        raise SubbyteError(f"'{name}' is a {type(factory).__name__}; give a function or a class")
    try:
        net = factory()
    except Exception as error:
        raise SubbyteError(f"'{name}' failed: {_in_one_line(error)}") from None
    if not isinstance(net, nn.Module):
        raise SubbyteError(f"'{name}' returns a {type(net).__name__}; it must return an nn.Module")
    return net


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder among the places that modules come from, as `python -m` has it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _in_one_line(error: Exception) -> str:
    """An exception of somebody's code: its type, its first line, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last)
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}{place}"


def packed_network(file: Path | str, model: str | None, precision: Any) -> nn.Module:
    """The network in a packed file; model: the factory of its float form, if the file needs it."""
    skeleton = None if model is None else from_factory(model)
    try:
        return storage.load(file, skeleton, precision=precision)
    except SubbyteError:
        if model is None and not storage.read(file).opens_alone:
            raise SubbyteError(
                f"{file}: the file holds no zoo network; name the function that makes it: "
                "--model package.module:factory"
            ) from None
        raise


def arguments_for(name: str, images: ImageSet) -> dict[str, Any]:
    """The arguments of a zoo network that follow from the data, as far as it has them.

    A network that crops its images keeps the size that it was made for.
    """
    channels, _, side = images.images.shape[1:]
    known = {"in_channels": channels, "classes": len(images.classes)}
    with torch.device("meta"):
        if not build(name).preprocess.crop:
            known["image_size"] = side
    takes = inspect.signature(NETWORKS[name]).parameters
    return {key: value for key, value in known.items() if key in takes}
