"""The optimizer and the learning rate, both pure functions of the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from subbyte.train.settings import LoopConfig

_ADAM_BETA2 = 0.999


def build_optimizer(parameters: Iterable[Parameter], config: LoopConfig) -> Optimizer:
    """Weight decay acts on matrices and kernels; scales, biases and norms (ndim < 2) go without."""
    groups = _groups([p for p in parameters if p.requires_grad], config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, betas=(config.momentum, _ADAM_BETA2))
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _groups(parameters: list[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: LoopConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of step 0, 1, ... of the whole run: a linear warm-up, then the schedule."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * _factor(config, step, steps_per_epoch, warmup)


def _factor(config: LoopConfig, step: int, steps_per_epoch: int, warmup: int) -> float:
    if config.schedule == "cosine":
        done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if config.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return float(config.gamma**passed)
    return 1.0


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
