"""One update of the weights, and the state that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from subbyte.methods import after_step, penalty
from subbyte.models import Network
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.evaluate import count_correct, device_of
from subbyte.train.optim import build_optimizer
from subbyte.train.settings import LoopConfig
from subbyte.train.watch import Histograms

_TEMPERATURE = 2.0  # of both softmaxes in distillation
_DISTILLED = 0.9  # its share of the loss; the labels have the rest

_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


@dataclass
class State:
    """What the loop changes."""

    model: Network
    optimizer: Optimizer
    ema: AveragedModel | None
    teacher: nn.Module | None = None
    epoch: int = 0
    history: tuple[EpochRecord, ...] = ()
    codes: Mapping[str, Tensor] = field(default_factory=dict)  # after the last epoch
    histograms: tuple[Histograms, ...] = ()

    @property
    def best(self) -> nn.Module:
        """What is evaluated and kept."""
        return self.model if self.ema is None else self.ema.module


def start(model: Network, config: LoopConfig, teacher: nn.Module | None = None) -> State:
    """The state before the first epoch; the networks' memory changes to what suits it."""
    for network in (model, teacher):
        if network is not None:
            lay_out(network, _memory_format(network))
    ema = averaged(model, config.ema) if config.ema else None
    return State(model, build_optimizer(model.parameters(), config), ema, teacher)


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """In place; only 4-D parameters and buffers have another layout."""
    model.to(memory_format=memory_format)  # type: ignore[call-overload]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Average = decay * average + (1 - decay) * model at every update; the first one copies.

    Counters and other integer buffers are copied: rounding their average would make them drift.
    """

    def update(average: _Tensors, current: _Tensors, _: Tensor | int) -> None:
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1.0 - decay)
        else:
            torch._foreach_copy_(average, current)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update), use_buffers=True)


def update(
    state: State, x: Tensor, y: Tensor, config: LoopConfig, progress: float
) -> tuple[float, int]:
    """One update; the task's loss (not finite if the whole loss is not) and the hits before it.

    `cached` makes every weight be quantized once, however often the forward pass reads it.
    """
    model, device = state.model, device_of(state.model)
    x, y = model.preprocess(x.to(device)), y.to(device)
    x = x.contiguous(memory_format=_memory_format(model, x))
    state.optimizer.zero_grad(set_to_none=True)
    with parametrize.cached():
        with _autocast(config, device):
            logits = model(x)
        task = F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)
        if state.teacher is not None:
            task = torch.lerp(task, _distillation(logits, state.teacher, x), _DISTILLED)
        loss = task + penalty(model, progress)
        if not loss.isfinite():
            return loss.item(), 0
        loss.backward()
    if config.clip_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
    state.optimizer.step()
    after_step(model, progress)
    if state.ema is not None:
        state.ema.update_parameters(model)
    return task.item(), count_correct(logits.detach(), y)


def _distillation(logits: Tensor, teacher: nn.Module, x: Tensor) -> Tensor:
    """T^2 KL(teacher / T, student / T), the mean over images (Hinton et al., arXiv:1503.02531)."""
    with torch.no_grad():
        target = (teacher(x).float() / _TEMPERATURE).log_softmax(-1)
    ours = (logits.float() / _TEMPERATURE).log_softmax(-1)
    return _TEMPERATURE**2 * F.kl_div(ours, target, reduction="batchmean", log_target=True)


def _autocast(config: LoopConfig, device: torch.device) -> torch.autocast | nullcontext[None]:
    if precision_on(device, config) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def precision_on(device: torch.device, config: LoopConfig) -> str:
    """ "float32" or "bf16"; "auto" is bf16 where the device has instructions for it."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if _has_bf16(device) else "float32"


def _has_bf16(device: torch.device) -> bool:
    native = {"avx512_bf16", "amx_bf16", "sve_bf16", "bf16"}
    found = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(found.get(name) for name in native)


def emulates_bf16(model: nn.Module, config: LoopConfig) -> bool:
    """Whether bf16 is asked for on a CPU that must emulate it (many times slower than float32)."""
    return config.precision == "bf16" and not _has_bf16(device_of(model))


def _memory_format(model: nn.Module, x: Tensor | None = None) -> torch.memory_format:
    """channels_last suits a network with 2-d convolutions, for images that are 4-D."""
    convs = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if convs and (x is None or x.ndim == 4):
        return torch.channels_last
    return torch.contiguous_format
