"""Which norm is behind which layer, found by watching one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def norms_behind(model: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
    """Layer name -> the BatchNorm that takes its output as it is, found by one pass.

    A layer that is called more than once, or whose output goes to several norms, is left out; what
    else may read its output cannot be seen from here. run: runs the model once on some inputs; the
    model is in eval mode meanwhile.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}
    calls: dict[str, int] = {}
    pairs: dict[str, list[str]] = {}

    def after(name: str) -> Any:
        def hook(_: Any, __: Any, y: Tensor) -> None:
            outputs[id(y)] = (name, y)  # y is held, so that its id stays its own
            calls[name] = calls.get(name, 0) + 1

        return hook

    def before(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            found = outputs.get(id(args[0]))
            if found is not None:
                pairs.setdefault(found[0], []).append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            handles.append(module.register_forward_hook(after(name)))
        if isinstance(module, BATCHNORMS) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before(name)))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            run()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {n: norms[0] for n, norms in pairs.items() if len(norms) == 1 and calls[n] == 1}
