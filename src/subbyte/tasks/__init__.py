"""What networks are for: TASKS by name, and the guess where none is named."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subbyte.errors import SubbyteError
from subbyte.tasks.base import Score, Task, attention_mask, evaluate, main_tensor
from subbyte.tasks.batches import Batch, are_ids, values_of
from subbyte.tasks.classes import Classification, Dense, Language
from subbyte.tasks.values import Embedding, Regression

__all__ = [
    "TASKS",
    "Classification",
    "Dense",
    "Embedding",
    "Language",
    "Regression",
    "Score",
    "Task",
    "attention_mask",
    "evaluate",
    "main_tensor",
    "task_named",
    "task_of",
]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Language, Embedding, Regression, Dense)
}

_UNIT = 1e-3  # of lengths: rows of embeddings that were divided by theirs


def task_named(name: str) -> Task:
    """Raises SubbyteError for a name that is not in TASKS."""
    if name not in TASKS:
        raise SubbyteError(
            f"task {name!r} is not known; use one of {', '.join(TASKS)}, or give a Task of your own"
        )
    return TASKS[name]()


def task_of(y: Any, batch: Batch) -> Task:
    """The task that a network's outputs `y` for a batch look like.

    Raises SubbyteError where no output is made of floats.
    """
    named = y.keys() if isinstance(y, dict) else ()
    if hasattr(y, "last_hidden_state") and not hasattr(y, "logits"):
        return Embedding()
    if isinstance(y, tuple | list) or (isinstance(y, dict) and not {"logits", "out"} & set(named)):
        return Regression()
    return _task_of_tensor(main_tensor(y), batch)


def _task_of_tensor(y: Tensor, batch: Batch) -> Task:
    if not y.is_floating_point():
        raise SubbyteError(
            f"the network returns a tensor of {str(y.dtype).removeprefix('torch.')}; it has to "
            "return scores or values: floats"
        )
    if y.ndim < 2 or y.shape[-1] == 1 or (y.ndim > 3 and y.shape[1] == 1):
        return Regression()
    if y.ndim > 3:
        return Dense()
    if bool(((y.float().norm(dim=-1) - 1).abs() < _UNIT).all()):
        return Embedding()
    if y.ndim == 3 and _reads_tokens(batch):
        return Language()
    return Classification()


def _reads_tokens(batch: Batch) -> bool:
    """Whether an input is token ids: whole numbers [n, tokens]."""
    return any(map(are_ids, values_of(batch)))
