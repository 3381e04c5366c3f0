"""From a configuration to a network, its method and its data, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.methods import prepare
from subbyte.methods.equalize import equalize
from subbyte.models import Network, build
from subbyte.train.evaluate import check_classes, check_labels, describe, eval_mode
from subbyte.train.initial import load_initial
from subbyte.train.settings import DataConfig, ModelConfig, RunConfig


@dataclass(frozen=True)
class Setup:
    """plan: what `prepare` did, None in a float run. teacher: in eval mode, without gradients."""

    model: Network
    train: ImageSet
    test: ImageSet
    plan: Any | None
    teacher: Network | None


def set_up(config: RunConfig) -> Setup:
    """Data, network, checks, method, in this order; weights come from torch's global generator."""
    train, test = _load(config.data)
    model = _build(config.model, config.model.weights)
    for data in (train, test):
        _check_fit(model, data)
    if config.model.equalize is not None:
        equalize(model, model.preprocess(train.images[:2]), config.model.equalize)
    plan = None if config.recipe is None else prepare(model, config.recipe)
    return Setup(model, train, test, plan, _teacher(config))


def _load(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    train = load_images(config.source, config.train_split, size=config.size)
    test = load_images(config.source, config.test_split, size=config.size)
    return train, test


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
