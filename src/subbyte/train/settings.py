"""What a run is asked to do, as frozen values; each checks its own ranges when it is made.

`subbyte.train.config` reads them from TOML. A `SubbyteError` from here names the field, its value
and the range; the reader adds the file and the section.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from subbyte.core.recipe import Recipe
from subbyte.data import Augment
from subbyte.errors import SubbyteError
from subbyte.modules.absorb import BatchNormMode

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["cosine", "step", "constant"]
Precision = Literal["float32", "bf16", "auto"]
StrategyName = Literal["ddp", "fsdp"]


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise SubbyteError(f"{name} = {value!r}: expected {expected}")


def _require_choice(name: str, value: object, literal: object) -> None:
    choices = get_args(literal)
    _require(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))


@dataclass(frozen=True)
class ModelConfig:
    """A network by the name it is registered under, and the arguments of its builder.

    weights: what to start from, None at random: float weights (.safetensors), a packed file, or the
    `checkpoint.pt` of another run. equalize: a number of levels; channels in front of a BatchNorm
    are rescaled so that one power of two a layer suits them all (`methods.equalize`).
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    equalize: int | None = None

    def __post_init__(self) -> None:
        ok = self.equalize is None or 2 <= self.equalize <= 256
        _require(ok, "equalize", self.equalize, "2 to 256 levels")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and how the training images vary.

    size: side in pixels every image is resized to, None leaves it. crop: pixels of padding before
    a random crop. cutout: side in pixels of the square that is blanked. unreadable: how many images
    of a split may be left out because they are missing or damaged; a note names them.
    """

    source: str
    train_split: str = "train"
    test_split: str = "test"
    size: int | None = None
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    unreadable: int = 0

    def __post_init__(self) -> None:
        _require(self.size is None or self.size >= 1, "size", self.size, "at least 1")
        _require(self.crop <= 1024, "crop", self.crop, "at most 1024 pixels")
        _require(self.unreadable >= 0, "unreadable", self.unreadable, "0 or more")
        self.augment()  # checks its own ranges

    def augment(self) -> Augment:
        return Augment(self.crop, self.flip, self.cutout)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How the weights are found.

    lr: the peak learning rate. momentum: SGD's momentum, AdamW's first beta. weight_decay: on
    parameters of two or more dimensions only. milestones: epochs at which schedule "step"
    multiplies the learning rate by `gamma`. ema: decay of the averaged weights that are evaluated
    and saved, 0 for none. clip_grad_norm: the largest gradient norm, 0 for no limit. teacher:
    weights of the same network, of any kind that `ModelConfig.weights` takes, whose outputs are
    learned along with the labels (knowledge distillation). precision: of products in training;
    "auto" is bf16 where the device has instructions for it. threads: PyTorch's CPU threads, None
    leaves them. limit_batches: steps an epoch at most, for trials. strategy: how several processes
    share the network, "ddp" (each has a copy) or "fsdp" (each has a shard). batch_size is that of
    all processes together.
    """

    epochs: int
    batch_size: int = 128
    optimizer: OptimizerName = "sgd"
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: ScheduleName = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    precision: Precision = "float32"
    ema: float = 0.0
    clip_grad_norm: float = 0.0
    teacher: str | None = None
    seed: int = 0
    threads: int | None = None
    limit_batches: int | None = None
    strategy: StrategyName = "ddp"

    def __post_init__(self) -> None:
        self._check_loop()
        self._check_optimizer()
        self._check_schedule()

    def _check_loop(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(2 <= self.batch_size < 2**31, "batch_size", self.batch_size, "2 to 2**31 - 1")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "[0, 1)")
        _require(0 <= self.ema < 1, "ema", self.ema, "0 <= ema < 1")
        _require_choice("precision", self.precision, Precision)
        _require_choice("strategy", self.strategy, StrategyName)
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2**63")
        for name in ("threads", "limit_batches"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or leave it out")
        most = 4 * (os.cpu_count() or 1)
        _require((self.threads or 1) <= most, "threads", self.threads, f"at most {most} here")

    def _check_optimizer(self) -> None:
        _require_choice("optimizer", self.optimizer, OptimizerName)
        _require(0 < self.lr < math.inf, "lr", self.lr, "a finite number above 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "0 <= momentum < 1")
        _require(
            not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0),
            "nesterov",
            self.nesterov,
            'false, unless optimizer is "sgd" with momentum > 0',
        )
        for name in ("weight_decay", "clip_grad_norm"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "a finite number, 0 or more")

    def _check_schedule(self) -> None:
        _require_choice("schedule", self.schedule, ScheduleName)
        _require(0 < self.gamma <= 1, "gamma", self.gamma, "0 < gamma <= 1")
        _require(
            0 <= self.warmup_epochs < self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"0 or more and below epochs = {self.epochs}",
        )
        _require(
            bool(self.milestones) == (self.schedule == "step"),
            "milestones",
            self.milestones,
            'epochs when schedule = "step", and none with another schedule',
        )
        rising = all(a < b for a, b in zip((0, *self.milestones), self.milestones, strict=False))
        _require(rising, "milestones", self.milestones, "rising epochs of at least 1")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. recipe: None trains in float.

    compress: of the saved network (`storage.save`). batchnorm: in it, "keep", "absorb" or
    "power_of_two" (`pack`). out: the folder of the checkpoint, the metrics and the network.
    """

    model: ModelConfig
    data: DataConfig
    train: LoopConfig
    recipe: Recipe | None = None
    out: Path = Path("runs/run")
    compress: bool = False
    batchnorm: BatchNormMode = "keep"
