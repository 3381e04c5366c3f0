"""One update of the weights, and the state that it changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from subbyte.core.group import ALONE, Group, is_sharded, local
from subbyte.core.ready import copied
from subbyte.methods import after_step, penalty
from subbyte.models import Network
from subbyte.train.checkpoint import EpochRecord
from subbyte.train.evaluate import count_correct, device_of
from subbyte.train.norms import synced_norms
from subbyte.train.optim import build_optimizer
from subbyte.train.parallel import Forward, copied_to_all, gathered, shard
from subbyte.train.settings import LoopConfig
from subbyte.train.watch import Histograms

_TEMPERATURE = 2.0  # of both softmaxes in distillation
_DISTILLED = 0.9  # its share of the loss; the labels have the rest

_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


@dataclass
class State:
    """What the loop changes.

    forward: what is called in a step. twin: of a sharded network, one of whole parameters.
    """

    model: Network
    optimizer: Optimizer
    ema: AveragedModel | None
    forward: Forward
    teacher: nn.Module | None = None
    twin: Network | None = None
    group: Group = ALONE
    epoch: int = 0
    history: tuple[EpochRecord, ...] = ()
    codes: Mapping[str, Tensor] = field(default_factory=dict)  # after the last epoch
    histograms: tuple[Histograms, ...] = ()

    @property
    def best(self) -> nn.Module:
        """What is evaluated and kept, whole; all processes ask for it together."""
        kept = self.model if self.ema is None else self.ema.module
        if self.twin is None:
            return kept
        self.twin.load_state_dict(gathered(kept.state_dict()))
        return self.twin


def start(
    model: Network, config: LoopConfig, teacher: nn.Module | None = None, group: Group = ALONE
) -> State:
    """The state before the first epoch; the networks' memory changes to what suits it.

    Neither FSDP2 nor the buckets of DDP take weights that are not contiguous as they are.
    """
    sharded = not group.alone and config.strategy == "fsdp"
    for network in (model, teacher):
        if network is not None:
            network.to(group.device)
            lay_out(network, _memory_format(network) if group.alone else torch.contiguous_format)
    ema = averaged(model, config.ema) if config.ema else None
    twin = copied(model) if sharded else None
    if sharded:
        shard(model, group)
        if ema is not None:
            shard(ema.module, group)
    forward = model if sharded else copied_to_all(model, group)
    optimizer = build_optimizer(model.parameters(), config)
    return State(model, optimizer, ema, forward, teacher, twin, group)


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """In place; only 4-D parameters and buffers have another layout."""
    model.to(memory_format=memory_format)  # type: ignore[call-overload]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Average = decay * average + (1 - decay) * model at every update; the first one copies.

    Counters and other integer buffers are copied: rounding their average would make them drift.
    """

    def update(average: _Tensors, current: _Tensors, _: Tensor | int) -> None:
        if average[0].is_floating_point():
            torch._foreach_lerp_([*map(local, average)], [*map(local, current)], 1.0 - decay)
        else:
            torch._foreach_copy_(average, current)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update), use_buffers=True)


def update(
    state: State, x: Tensor, y: Tensor, config: LoopConfig, progress: float, n: int | None = None
) -> tuple[float, int]:
    """One update; the task's loss (not finite if the whole loss is not) and the hits before it.

    x, y: this process's part of a batch of n images, all of them if n is None; loss and hits are of
    the batch. `cached` makes every weight be quantized once, however often the forward pass reads
    it. The penalty, of a process's own shards or alike in all, takes no part in the average.
    """
    model, group, device = state.model, state.group, device_of(state.model)
    x, y = model.preprocess(x.to(device)), y.to(device)
    x = x.contiguous(memory_format=_memory_format(model, x))
    state.optimizer.zero_grad(set_to_none=True)
    with parametrize.cached(), synced_norms(model, group):
        with _autocast(config, device):
            logits = state.forward(x)
        share = (len(y) if n is None else n) / group.size  # gradients are averaged over processes
        task = _loss(logits, y, state.teacher, x, config.label_smoothing) / share
    pull = penalty(model, progress)
    more = pull.item() if isinstance(pull, Tensor) else pull
    own = (task.item() / group.size, count_correct(logits.detach(), y), more)
    total, hits, more = group.sum(*own)
    if not math.isfinite(total + more):
        return total + more, 0
    task.backward()
    if isinstance(pull, Tensor):
        pull.backward()
    if config.clip_grad_norm:
        _clip(model, config.clip_grad_norm)
    state.optimizer.step()
    after_step(model, progress)
    if state.ema is not None:
        state.ema.update_parameters(model)
    return total, int(hits)


def _loss(
    logits: Tensor, y: Tensor, teacher: nn.Module | None, x: Tensor, smoothing: float
) -> Tensor:
    """The task's loss, summed over the images."""
    task = F.cross_entropy(logits.float(), y, label_smoothing=smoothing, reduction="sum")
    if teacher is None:
        return task
    return torch.lerp(task, _distillation(logits, teacher, x), _DISTILLED)


def _distillation(logits: Tensor, teacher: nn.Module, x: Tensor) -> Tensor:
    """T^2 KL(teacher / T, student / T), summed over images (Hinton et al., arXiv:1503.02531)."""
    with torch.no_grad():
        target = (teacher(x).float() / _TEMPERATURE).log_softmax(-1)
    ours = (logits.float() / _TEMPERATURE).log_softmax(-1)
    return _TEMPERATURE**2 * F.kl_div(ours, target, reduction="sum", log_target=True)


def _clip(model: nn.Module, most: float) -> None:
    """All gradients to a norm, all of them together, of at most so much."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = norm.full_tensor() if is_sharded(norm) else norm
    nn.utils.clip_grads_with_norm_(parameters, most, whole)


@torch.no_grad()
def first_not_finite(state: State, x: Tensor) -> str | None:
    """The layer whose output is the first that is not finite, in any process; None if all are."""
    bad: list[tuple[int, str]] = []  # which call of a module it was, and of what module
    calls = itertools.count()

    def look(name: str, _: nn.Module, __: Any, y: Any) -> None:
        call = next(calls)
        if isinstance(y, Tensor) and not y.isfinite().all():
            bad.append((call, name.partition(".parametrizations")[0]))

    hooks = [m.register_forward_hook(partial(look, n)) for n, m in state.model.named_modules()]
    with synced_norms(state.model, state.group):
        state.model(state.model.preprocess(x.to(device_of(state.model))))
    for hook in hooks:
        hook.remove()
    return min((x for own in state.group.gathered(bad[:1]) for x in own), default=(0, None))[1]


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
