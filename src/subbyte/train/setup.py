"""From a configuration to a network, its method and its data, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from subbyte.core.group import ALONE, Group
from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.methods import prepare
from subbyte.methods.equalize import equalize
from subbyte.models import Network, build
from subbyte.train.evaluate import check_classes, check_labels, describe, eval_mode
from subbyte.train.initial import load_initial
from subbyte.train.settings import DataConfig, ModelConfig, RunConfig

_NAMED = 10  # images that a note names, of those that are left out


@dataclass(frozen=True)
class Setup:
    """plan: what `prepare` did, None in a float run. teacher: in eval mode, without gradients."""

    model: Network
    train: ImageSet
    test: ImageSet
    plan: Any | None
    teacher: Network | None

    def notes(self) -> tuple[str, ...]:
        """What the method does, and which images could not be read."""
        found = () if self.plan is None else (str(self.plan),)
        short = [data for data in (self.train, self.test) if data.left_out]
        return (*found, *(_left_out(data) for data in short))


def set_up(config: RunConfig, group: Group = ALONE) -> Setup:
    """Data, network, checks, method, in this order; weights come from torch's global generator.

    Of a group the leading process decodes the images, and the others find them decoded.
    """
    with group.in_turn():
        train, test = _load(config.data)
    model = _build(config.model, config.model.weights)
    for data in (train, test):
        _check_fit(model, data)
    if config.model.equalize is not None:
        equalize(model, model.preprocess(train.images[:2]), config.model.equalize)
    plan = None if config.recipe is None else prepare(model, config.recipe)
    return Setup(model, train, test, plan, _teacher(config))


def _load(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    size, unreadable = config.size, config.unreadable
    train = load_images(config.source, config.train_split, size=size, unreadable=unreadable)
    test = load_images(config.source, config.test_split, size=size, unreadable=unreadable)
    return train, test


def _left_out(data: ImageSet) -> str:
    names = "; ".join(data.left_out[:_NAMED])
    more = len(data.left_out) - _NAMED
    rest = f"; and {more} more" if more > 0 else ""
    return f"{len(data.left_out)} images of {describe(data)} are left out: {names}{rest}"


def _build(config: ModelConfig, weights: str | None) -> Network:
    try:
        model = build(config.name, **config.arguments)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise SubbyteError(
            f"network '{config.name}' cannot be built with {dict(config.arguments)}: "
            f"{str(error).splitlines()[0][:200]}; check model.arguments"
        ) from None
    if weights is not None:
        load_initial(model, weights)
    return model


def _teacher(config: RunConfig) -> Network | None:
    if config.train.teacher is None:
        return None
    return _build(config.model, config.train.teacher).eval().requires_grad_(False)


def _check_fit(model: Network, data: ImageSet) -> None:
    """The network has a class for every label, as many as the data, and takes its images."""
    if len(data) < 2:
        raise SubbyteError(f"{describe(data)} has {len(data)} images; at least 2 are needed")
    check_labels(data, model.classes)
    check_classes(model, data)
    _try_one(model, data)


def _try_one(model: Network, data: ImageSet) -> None:
    try:
        with eval_mode(model), torch.inference_mode():
            model(model.preprocess(data.images[:1]))
    except (RuntimeError, ValueError) as error:
        raise SubbyteError(
            f"the network does not take images of shape {tuple(data.images.shape[1:])} "
            f"({describe(data)}): {error}; check model.arguments and data.size"
        ) from error
