"""Experts that a network of `transformers` keeps in stacks, each expert's weights a slice.

`transformers` gives the classes of all its mixtures one form: stacks [experts, out, in] (transposed
where `is_transposed`) named `gate_up_proj` or `up_proj`, and `down_proj`, with `_apply_gate` or
`act_fn` between. `Experts` computes the same with `nn.Linear` for each slice, so each expert is
measured by the tokens that reach it. Recognized by its structure; `transformers` is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.core.ready import copied

_FLAGS = ("has_gate", "has_bias", "is_transposed")


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the flags, the stacks and the biases of that form, and no more."""
    own: Any = module
    if not all(isinstance(getattr(own, flag, None), bool) for flag in _FLAGS):
        return False
    if module._buffers or getattr(own, "has_post_expert_norm", False):
        return False
    held = {name: value for name, value in module._parameters.items() if value is not None}
    if set(held) != set(_names(own)) or not callable(getattr(own, _between(own), None)):
        return False
    stacks = [held[name] for name in _stacks(own)]
    return all(stack.ndim == 3 for stack in stacks) and stacks[0].shape[0] == stacks[1].shape[0]


class Expert(nn.Module):
    """One expert: a linear layer, what `Experts.between` does, a linear layer."""

    def __init__(self, stacked: Any, index: int) -> None:
        super().__init__()
        for name in _stacks(stacked):
            self.add_module(name, _linear(stacked, name, index))


class Experts(nn.Module):
    """What a module of stacked experts computes, with the experts one after the other.

    Called with hidden states [tokens, width], the experts of each token [tokens, k] and their
    weights [tokens, k]; gives [tokens, width]. An index of no expert (one that another machine
    holds) adds nothing.
    """

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        own: Any = stacked
        self.n_experts = len(getattr(own, _stacks(own)[0]))
        for index in range(self.n_experts):
            self.add_module(str(index), Expert(own, index))
        self.has_gate = own.has_gate
        self.between = _without_weights(stacked)
        self.train(stacked.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens of no expert of ours keep zeros."""
        found = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if 0 <= index < self.n_experts:
                token, place = torch.where(top_k_index == index)
                y = self._expert(index, hidden_states[token])
                weighted = y * top_k_weights[token, place, None]
                found.index_add_(0, token, weighted.to(found.dtype))
        return found

    def _expert(self, index: int, x: Tensor) -> Tensor:
        first, last = self.get_submodule(str(index)).children()
        inner: Any = self.between
        h = first(x)
        y: Tensor = last(inner._apply_gate(h) if self.has_gate else inner.act_fn(h))
        return y


def _stacks(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _between(module: Any) -> str:
    return "_apply_gate" if module.has_gate else "act_fn"


def _names(module: Any) -> Iterator[str]:
    for name in _stacks(module):
        yield name
        if module.has_bias:
            yield f"{name}_bias"


def _linear(stacked: Any, name: str, index: int) -> nn.Linear:
    """One slice of a stack as a linear layer of its own."""
    stack = getattr(stacked, name)
    weight = stack.detach()[index]
    weight = weight.t() if stacked.is_transposed else weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=stacked.has_bias, device="meta")
    linear.weight = nn.Parameter(_own(weight), stack.requires_grad)
    if stacked.has_bias:
        bias = getattr(stacked, f"{name}_bias")
        linear.bias = nn.Parameter(_own(bias.detach()[index]), bias.requires_grad)
    return linear


def _own(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _without_weights(stacked: nn.Module) -> nn.Module:
    """A copy that knows what lies between the stacks, and holds none of them."""
    bare = copied(stacked, stacked._parameters.values())  # type: ignore[arg-type]
    for name in _names(bare):
        del bare._parameters[name]
    return bare
