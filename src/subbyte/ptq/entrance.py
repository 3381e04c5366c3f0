"""What post-training quantization does before any work starts: copy, check, refuse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from subbyte.core.as_linear import linears_in_place
from subbyte.core.ready import check_present, copied, make_plain, unwrapped
from subbyte.core.sites import sites
from subbyte.errors import SubbyteError
from subbyte.methods import quantizers
from subbyte.tasks import Task, task_named, task_of
from subbyte.tasks.batches import Batch, Examples, call, shapes


def float_twin(model: nn.Module) -> nn.Module:
    """A copy to work on: on the CPU, in float32 and eval mode, with plain weights that learn.

    Wrappers (DataParallel, torch.compile) are taken off; weights that norms of weights, pruning or
    other parametrizations compute are made plain, and each Conv1D of `transformers` is the linear
    layer that it stands for. Raises SubbyteError for weights on the meta device, lazy layers, and a
    model that `prepare` has been at.
    """
    model = unwrapped(model)
    if any(True for _ in quantizers(model)):
        raise SubbyteError(
            "the model is prepared for training; freeze it, or give quantize the plain model"
        )
    sites(model)  # a lazy layer is named
    check_present(model)
    twin = copied(model).cpu().float().eval()
    for module in twin.modules():
        _make_plain(module)
    twin = linears_in_place(twin)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    set_cache(twin, False)
    return channels_last(twin)


def set_cache(model: nn.Module, keys: bool) -> None:
    """In place: whether a language model of `transformers` keeps the keys of tokens past, which
    only generating needs."""
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = keys  # type: ignore[union-attr]


def uses_cache(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "use_cache", False))


def channels_last(model: nn.Module) -> nn.Module:
    """In place: this layout of images doubles the speed of 2-d convolutions on a CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def checked_task(twin: nn.Module, examples: Examples, task: Task | str | None) -> tuple[Task, str]:
    """What the network is for, and a note if it was guessed from what it makes of two examples.

    Raises SubbyteError for a batch that the network refuses (its own message, with the shapes),
    outputs that are no floats or NaN, and a mask that hides all.
    """
    first = examples[:2].split(2)[0]
    try:
        y = call(twin, first)
    except SubbyteError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise SubbyteError(
            f"the network cannot run the calibration batches: {type(error).__name__}: {text} (a "
            f"batch was {shapes(first)}); give them as model(batch), model(*batch) or "
            "model(**batch) takes them"
        ) from error
    if isinstance(task, str):
        task = task_named(task)
    found = task_of(y, first) if task is None else task
    if not isinstance(found, Task):
        raise SubbyteError(f"task={task!r}; give a name of TASKS or a subbyte.tasks.Task")
    outputs = found.outputs(y, first)
    _check_outputs(twin, outputs, first)
    note = f"taken for the task '{found.name}' by its outputs; task= chooses another"
    return found, note if task is None and not isinstance(y, Tensor) else ""


def _check_outputs(twin: nn.Module, outputs: Tensor, first: Batch) -> None:
    name = type(twin).__name__
    if not outputs.is_floating_point():
        raise SubbyteError(f"{name} returns a tensor of {outputs.dtype}, no scores or values")
    if not outputs.numel():
        raise SubbyteError(
            f"nothing is left of the outputs of {name} on the first two calibration examples "
            f"({shapes(first)}); check the attention mask: all of it is padding"
        )
    given = first if isinstance(first, Tensor) else torch.zeros(())
    if outputs.isnan().any() and given.isfinite().all():
        raise SubbyteError(f"{name} returns NaN values; check its weights and the examples")


def _make_plain(module: nn.Module) -> None:
    """In place: parameters that are computed from others become parameters of their own."""
    if parametrize.is_parametrized(module):
        names = list(module.parametrizations)  # type: ignore[arg-type]
        make_plain(module, {name: getattr(module, name) for name in names})
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
