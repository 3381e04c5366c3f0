"""The processes that share a piece of work: one alone, or those that torchrun started.

Every process runs the same program on the same values. Images, batches and layers are divided by
rank. A call that talks to the other processes (all but `own` and `dealt`) is made by all of them,
in the same order.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from subbyte.errors import SubbyteError

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=Hashable)

TIMEOUT = timedelta(minutes=10)  # of a sum or an exchange: all processes arrive at about one time
_PATIENCE = timedelta(days=2)  # for what the leading process does while the others wait for it


@dataclass(frozen=True, eq=False)
class Group:
    """rank: 0 to size - 1. device: of this process. restarts: of all processes by torchrun so far.

    The process of rank 0 leads: it alone writes files and speaks.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    restarts: int = 0
    store: Any = None
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def own(self, n: int) -> slice:
        """This process's part of n things in a row; all processes' parts are all n, once each."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def dealt(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th item."""
        return items if self.alone else items[self.rank :: self.size]

    def sum(self, *values: float) -> list[float]:
        """Of each value over the processes, in float64."""
        if self.alone:
            return list(values)
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_(self, x: Tensor) -> Tensor:
        """In place, over the processes; no gradient."""
        if not self.alone:
            dist.all_reduce(x)
        return x

    def pooled(self, sums: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Each tensor summed over the processes, not all of which need have it; in the order of the
        first one's."""
        if self.alone:
            return dict(sums)
        kinds: dict[K, Any] = {}
        for own in self.gathered({name: (x.shape, x.dtype) for name, x in sums.items()}):
            kinds = {**kinds, **{name: kind for name, kind in own.items() if name not in kinds}}
        none = {n: torch.zeros(shape, dtype=kind) for n, (shape, kind) in kinds.items()}
        return {name: self.sum_(sums.get(name, zero)) for name, zero in none.items()}

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        found: list[Any] = [value] * self.size
        if not self.alone:
            dist.all_gather_object(found, value)
        return found

    def first(self, found: T | None) -> T | None:
        """What the first process that found something has found."""
        return next((own for own in self.gathered(found) if own is not None), None)

    def told(self, make: Callable[[], T]) -> T:
        """What the leading process makes of it; the others wait."""
        if self.alone:
            return make()
        key = f"told/{next(self._calls)}"
        box: list[Any] = [make() if self.leads else None]
        if self.leads:
            self.store.set(key, "")
        else:
            self.store.wait([key], _PATIENCE)
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The leading process goes through first, then the others."""
        if not self.leads:
            self.told(lambda: None)
        yield
        if self.leads:
            self.told(lambda: None)

    def each(
        self, function: Callable[[T], R], items: Sequence[T], cost: Callable[[T], float]
    ) -> list[R]:
        """The function of every item, each made by one process, known to all."""
        if self.alone:
            return [function(item) for item in items]
        owners = _dealt_by_cost([cost(items[i]) for i in range(len(items))], self.size)
        own = {i: function(x) for i, x in enumerate(items) if owners[i] == self.rank}
        made = {i: result for part in self.gathered(own) for i, result in part.items()}
        return [made[i] for i in range(len(items))]


ALONE = Group()


def _dealt_by_cost(costs: Sequence[float], n: int) -> list[int]:
    """Who takes each item: the dearest first, each to who has the least."""
    loads, owners = [0.0] * n, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


@contextmanager
def joined() -> Iterator[Group]:
    """The processes that torchrun started as one group, and their end; else one alone.

    An error of several processes leaves one of them, the first, as it is; the others end without a
    word. Raises SubbyteError where another process was lost.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Group(restarts=restarts)
        return
    group = _join(restarts)
    try:
        yield group
    except Exception as error:
        if _was_told(group):
            raise SystemExit(2) from None
        if _is_lost(error):
            raise SubbyteError(_LOST.format(group.rank)) from error
        raise
    finally:
        dist.destroy_process_group()


_LOST = (
    "process {} lost another process of the run, which was killed or cannot be reached; with "
    "torchrun --max-restarts=3 a run goes on from its last checkpoint by itself"
)


def _join(restarts: int) -> Group:
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        # torchrun keeps one store over restarts: what the last start left there is not for this one
        store = dist.PrefixStore(f"start/{restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise SubbyteError(
            f"the processes of the run cannot reach each other: {reason}; start them by torchrun"
        ) from error
    return Group(rank, size, device, restarts, store)


def _was_told(group: Group) -> bool:
    """Whether another process has failed before this one, and said why."""
    try:
        return bool(group.store.add("failed", 1) > 1)
    except dist.DistError:  # whoever kept the store is gone
        return True


def _is_lost(error: Exception) -> bool:
    """Whether it says that an exchange with another process failed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def is_sharded(x: Any) -> bool:
    """Whether the processes hold parts of this tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever shards has imported it
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is. Gradients pass."""
    sharded: Any = x
    return sharded.to_local() if is_sharded(x) else x  # type: ignore[no-any-return]
