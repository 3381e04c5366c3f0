"""A small run's checkpoint, damaged: for fuzz.py."""

from __future__ import annotations

import copy
import io
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import damage
import torch

from subbyte.core.recipe import Recipe, Rule
from subbyte.methods import LowRes
from subbyte.train import DataConfig, LoopConfig, ModelConfig, RunConfig, train
from subbyte.train.checkpoint import sealed
from subbyte.train.loop import CHECKPOINT


def config(out: Path, epochs: int = 1) -> RunConfig:
    """A run of seconds: the embedded digits, three steps an epoch."""
    loop = LoopConfig(epochs=epochs, lr=0.05, batch_size=64, limit_batches=3, threads=1)
    recipe = Recipe((Rule(method=LowRes(levels=3)),))
    return RunConfig(ModelConfig("digitsnet"), DataConfig("digits"), loop, recipe, out)


def made() -> bytes:
    """The checkpoint of a run of one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        train(config(Path(folder)))
        return (Path(folder) / CHECKPOINT).read_bytes()


def resumed(path: Path) -> None:
    """A run that goes on from this checkpoint; none of its epochs is left."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / CHECKPOINT)
        train(config(Path(folder)), resume=True)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes, or fields and tensors under a checksum that fits."""
    if draw.random() < 0.3:
        found = damage.bits(data, draw)
        return found if draw.random() < 0.5 else sealed(found[:-47])
    content = torch.load(io.BytesIO(data[:-47]), weights_only=True)
    for _ in range(draw.choice((1, 1, 2))):
        spoil(content, draw)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return sealed(buffer.getvalue())


def spoil(content: Any, draw: random.Random) -> None:
    """As `damage.change`, and of a tensor: another shape, type, NaN."""
    every = damage.places(content)
    *parents, key = draw.choice(every)
    parent = damage.at(content, tuple(parents))
    old = parent[key]
    if isinstance(old, torch.Tensor) and draw.random() < 0.7:
        ways = (lambda t: t[..., :-1] if t.ndim else t, lambda t: t.double(), lambda t: t.flatten(),
                lambda t: t.to(torch.int8), lambda t: t.new_zeros(0))  # fmt: skip
        parent[key] = draw.choice(ways)(old).clone()
    elif isinstance(parent, dict | list):
        parent[key] = copy.deepcopy(draw.choice(damage.HOSTILE))
