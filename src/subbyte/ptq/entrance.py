"""What post-training quantization does before any work starts: copy, check, refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from subbyte.core.ready import check_present, copied, make_plain, unwrapped
from subbyte.core.sites import sites
from subbyte.errors import SubbyteError
from subbyte.methods import quantizers
from subbyte.ptq.calibration import Examples, call

_UNIT = 1e-3  # of lengths: rows of embeddings that were divided by theirs


def float_twin(model: nn.Module) -> nn.Module:
    """A copy to work on: on the CPU, in float32 and eval mode, with plain weights that learn.

    Wrappers (DataParallel, torch.compile) are taken off; weights that norms of weights, pruning or
    other parametrizations compute are made plain. Raises SubbyteError for weights on the meta
    device, lazy layers, and a model that `prepare` has been at.
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
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return channels_last(twin)


def channels_last(model: nn.Module) -> nn.Module:
    """In place: this layout of images doubles the speed of 2-d convolutions on a CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def check_outputs(twin: nn.Module, examples: Examples) -> None:
    """Raises SubbyteError unless the network makes class scores [n, classes] or [n, tokens,
    classes] of the first two examples."""
    first = examples[:2].split(2)[0]
    try:
        y = call(twin, first)
    except SubbyteError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise SubbyteError(
            f"the network cannot run the calibration batches: {type(error).__name__}: {text}; give "
            "them as model(batch), model(*batch) or model(**batch) takes them"
        ) from error
    fault = _fault(y)
    given = first if isinstance(first, Tensor) else torch.zeros(())
    if fault is None and y.isnan().any() and given.isfinite().all():
        fault = "NaN values"
    if fault:
        raise SubbyteError(
            f"{type(twin).__name__} returns {fault}; quantize judges by class scores, one tensor "
            "[n, classes] or [n, tokens, classes]: wrap the network so that it returns these"
        )


def _fault(y: Any) -> str | None:
    """What an output is in place of class scores, in words."""
    if not isinstance(y, Tensor):
        logits = isinstance(getattr(y, "logits", None), Tensor)
        return f"a {type(y).__name__}" + (" with `.logits`" if logits else "")
    if not y.is_floating_point():
        return f"a tensor of {y.dtype}"
    shape = tuple(y.shape)
    if y.ndim < 2 or shape[-1] < 2:
        return f"one value an example (shape {shape}), as in regression"
    if y.ndim > 3:
        return f"maps (shape {shape})"
    lengths = y.float().norm(dim=-1)
    if bool(((lengths - 1).abs() < _UNIT).all()):
        return f"embeddings of length 1 (shape {shape})"
    return None


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
