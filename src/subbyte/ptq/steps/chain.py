"""Networks that are a chain of blocks, run a block at a time from what the block before gave.

A transformer is one: each block of an `nn.ModuleList` takes what the one before returned. To see
the inputs of a layer in block 20, there is no need to run blocks 0 to 19 again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subbyte.core.sites import join
from subbyte.tasks.batches import Batch, call, leaves


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """How a block is called, but for the hidden state. at: where that goes."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    at: int | str

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.at, int):
            args[self.at] = hidden
        else:
            kwargs[self.at] = hidden
        return block(*args, **kwargs)


@dataclass(slots=True)
class _Trace:
    """calls: of each block in turn. results: what each returned. fault: it was called again."""

    calls: list[tuple[BlockCall, Tensor]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


def blocks_of(model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Paths of the blocks of the longest chain in a network; empty if there is none of 2 or more.

    Each block has to be called once, in turn, its hidden state being what the one before returned;
    everything else that it is given has to be what the first was given.
    """
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for path, own in sorted(lists, key=lambda x: -len(x[1])):
        paths = tuple(join(path, str(i)) for i in range(len(own)))
        if len(paths) > 1 and _is_chain(model, paths, batch):
            return paths
    return ()


def _is_chain(model: nn.Module, paths: Sequence[str], batch: Batch) -> bool:
    trace = _Trace()
    with torch.no_grad(), _watched(model, paths, trace):
        call(model, batch)
    if len(trace.calls) != len(paths) or len(trace.results) != len(paths):
        return False
    first = trace.calls[0][0]
    for (own, hidden), before in zip(trace.calls[1:], trace.results, strict=False):
        if hidden is not hidden_of(before) or not _are_alike(first, own):
            return False
    return all(_is_plain(own) for own, _ in trace.calls)


def _are_alike(first: BlockCall, own: BlockCall) -> bool:
    """Whether a block is given what the first one was, but for the hidden state.

    Parts of one block in a list (T5's attention and feed-forward) are called one after the other
    too, but not alike.
    """
    names = (first.at, len(first.args), list(first.kwargs))
    if names != (own.at, len(own.args), list(own.kwargs)):
        return False
    pairs = zip(_leaves(first), _leaves(own), strict=False)
    return len(_leaves(first)) == len(_leaves(own)) and all(_is_same(x, y) for x, y in pairs)


def _leaves(own: BlockCall) -> list[Any]:
    return list(leaves((own.args, dict(own.kwargs))))


def _is_same(x: Any, y: Any) -> bool:
    """The same tensor, or an equal plain value."""
    return x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y)


def _is_plain(own: BlockCall) -> bool:
    """Whether a call can be repeated: nothing in it that remembers (a cache of keys, say)."""
    plain = (Tensor, str, bool, int, float, type(None), torch.dtype, torch.device)
    return all(isinstance(x, plain) for x in leaves((own.args, dict(own.kwargs))))


def hidden_of(result: Any) -> Any:
    """The hidden state in what a block returned: it, or the first of a tuple."""
    return result[0] if isinstance(result, tuple | list) and result else result


class _StoppedError(Exception):
    """The first block has been reached; the rest need not run."""


@contextmanager
def _watched(
    model: nn.Module, paths: Sequence[str], trace: _Trace, stop: bool = False
) -> Iterator[None]:
    """While it is open, calls of the blocks are written down. stop: the first one ends the pass."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = _parted(args, kwargs)
        if found is not None:
            trace.calls.append(found)
        if stop:
            raise _StoppedError

    def after(_: Any, args: Any, result: Any) -> None:
        trace.results.append(result)

    handles = []
    for path in paths:
        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parted(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[BlockCall, Tensor] | None:
    """The call without its hidden state, and the hidden state: the first tensor of floats."""
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and x.is_floating_point():
            return BlockCall((*args[:i], None, *args[i + 1 :]), kwargs, i), x
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            return BlockCall(args, {**kwargs, name: None}, name), x
    return None


@contextmanager
def recomputed(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """While it is open, a block keeps for the pass back what it was given and nothing else, and
    runs again when that comes to it: of 30 blocks one holds its activations, not all."""
    blocks = [vars(model.get_submodule(path)) for path in paths]
    before: list[Any] = [own.get("forward") for own in blocks]
    for path, own in zip(paths, blocks, strict=True):
        forward = model.get_submodule(path).forward
        own["forward"] = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for own, old in zip(blocks, before, strict=True):
            own.pop("forward")
            if old is not None:
                own["forward"] = old


class Chain:
    """Where a network stands between two of its blocks, for each of some batches."""

    def __init__(self, model: nn.Module, paths: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model, self.paths = model, paths
        self.calls: list[BlockCall] = []
        self.hidden: list[Tensor] = []
        self.in_tuple = False  # whether blocks return the hidden state as the first of several
        for x in batches:
            trace = _Trace()
            with torch.no_grad(), suppress(_StoppedError), _watched(model, paths, trace, stop=True):
                call(model, x)
            own, hidden = trace.calls[0]
            self.calls.append(own)
            self.hidden.append(hidden)

    def run(self, i: int, batch: int) -> Any:
        """What block i makes of a batch; all blocks before it have been passed."""
        return self.calls[batch](self.model.get_submodule(self.paths[i]), self.hidden[batch])

    def pass_block(self, i: int) -> None:
        """On to the border behind block i."""
        self.pass_through(self.model.get_submodule(self.paths[i]))

    @torch.no_grad()
    def pass_through(self, block: nn.Module) -> None:
        """On to the border behind a block, which need not be one of the network's own."""
        for batch, own in enumerate(self.calls):
            result = own(block, self.hidden[batch])
            self.in_tuple = isinstance(result, tuple | list)
            self.hidden[batch] = hidden_of(result)

    @contextmanager
    def behind(self, model: nn.Module) -> Iterator[None]:
        """While it is open, a network with such blocks does not run them: of each batch in turn
        they hand on the hidden state at which this stands."""
        turn = itertools.cycle(self.hidden)
        now: list[Tensor] = []

        def handed_on(path: str, *_: Any, **__: Any) -> Any:
            if path == self.paths[0]:
                now[:] = [next(turn)]
            return (now[0],) if self.in_tuple else now[0]

        blocks = {path: vars(model.get_submodule(path)) for path in self.paths}
        for path, own in blocks.items():
            own["forward"] = partial(handed_on, path)
        try:
            yield
        finally:
            for own in blocks.values():
                own.pop("forward")
