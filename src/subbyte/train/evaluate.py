"""Top-1 accuracy and cross-entropy of a network on a data set, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subbyte.core.group import ALONE, Group
from subbyte.data import ImageSet, batches
from subbyte.errors import SubbyteError
from subbyte.models import Network

ToInput = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """top1 in percent; loss: mean cross-entropy, not finite if any logit is not; n images."""

    top1: float
    loss: float
    n: int


def evaluate(
    model: nn.Module,
    data: ImageSet,
    *,
    preprocess: ToInput | None = None,
    batch_size: int = 256,
    group: Group = ALONE,
) -> Evaluation:
    """The model, put into eval mode for the while, on every image of the data.

    preprocess: uint8 [n, c, h, w] to the model's input; a `Network` brings its own. An image with
    a logit that is not finite counts as wrong. group: processes that share the images, `batch_size`
    each at a time; all of them get the figures. Raises SubbyteError for an empty data set and for
    a label that the output has no class for.
    """
    if len(data) == 0:
        raise SubbyteError(f"{describe(data)} is empty; there is nothing to evaluate")
    if isinstance(model, Network):
        check_classes(model, data)
    preprocess = preprocess or preprocess_of(model)
    device = device_of(model)
    correct, loss = 0, 0.0
    with eval_mode(model), torch.inference_mode(), parametrize.cached():
        for x, y in batches(data, batch_size * group.size, group=group):
            logits = model(preprocess(x.to(device))).float()
            check_labels(data, logits.shape[1])
            y = y.to(device)
            correct += count_correct(logits, y)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
    hits, total = group.sum(correct, loss)
    return Evaluation(100.0 * hits / len(data), total / len(data), len(data))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def preprocess_of(model: nn.Module) -> ToInput:
    """How uint8 images [n, c, h, w] become the network's input: its own `preprocess`."""
    preprocess = getattr(model, "preprocess", None)
    if not callable(preprocess):
        raise SubbyteError(
            f"{type(model).__name__} has no `preprocess`; give the network an attribute of that "
            "name that turns uint8 images [n, c, h, w] into its input (subbyte.models.Preprocess "
            "does)"
        )
    return preprocess  # type: ignore[no-any-return]


def device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def describe(data: ImageSet) -> str:
    return f"split '{data.split}' of '{data.source}'"


def check_classes(model: Network, data: ImageSet) -> None:
    """Raises SubbyteError if the network and the data count classes differently."""
    if model.classes != len(data.classes):
        raise SubbyteError(
            f"the network has {model.classes} classes, {describe(data)} has {len(data.classes)}; "
            f"set model.arguments.classes = {len(data.classes)}, or choose the data it was made for"
        )


def check_labels(data: ImageSet, n_classes: int) -> None:
    """Raises SubbyteError naming the first label outside 0 .. n_classes - 1."""
    wrong = (data.labels < 0) | (data.labels >= n_classes)
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        raise SubbyteError(
            f"label {int(data.labels[index])} of image {index} in {describe(data)} is outside the "
            f"network's {n_classes} classes (0 to {n_classes - 1}); build it with more classes"
        )


def count_correct(logits: Tensor, y: Tensor) -> int:
    """How many rows have their largest logit at y; a row that is not finite is wrong."""
    right = (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)
    return int(right.sum())
