"""CoRa as published: k-sigma codes, plain SVD of the residual, ranks searched by gradient descent.

    W_hat = k_sigma(W)                one scale a tensor, asymmetric; first and last layer too
    W - W_hat = U S V'                R singular values
    T_i = (1 + ((i / R) / r)^(2 k))^(-1/2), i = 1 .. R, divided by T_1     normalised Butterworth
    weight(r) = W_hat + U S^(1/2) T T S^(1/2) V'                         one scalar r a layer
    loss = cross-entropy + gamma exp(relu(b - b_target)),   b = sum_l r_l R_l (out + width) / all

Adam on r with its gradient clipped, r kept in [1/R, 1]; at the end each convolution gets the plain
SVD of rank ceil(R r). "Reclaiming Residual Knowledge", arXiv:2408.00923, and its released code.
Ours:
- batches of 32 images, drawn anew each epoch;
- the search runs BatchNorm in training mode, as the released code does, on a copy: the network that
  comes out keeps the float statistics (re-estimated ones cost the float network 2.8 points);
- the gradient of each r is clipped to [-clip, clip];
- `labels=False`: the float network's softmax in place of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from subbyte.core.plan import Plan, PlannedLayer
from subbyte.core.ready import copied
from subbyte.core.sites import Site, bias_of
from subbyte.core.tensors import QuantizedLayer, as_matrix
from subbyte.errors import SubbyteError
from subbyte.ptq.solvers import KSigma, weight_of
from subbyte.ptq.solvers.lowrank import Metric, fit_adapter
from subbyte.tasks.batches import Examples, Ragged, call

_BATCH = 32
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True, slots=True)
class PublishedCoRa:
    """The paper's options and their published values.

    bits: of the codes, 1 to 8. k: standard deviations of the range, None for least to largest.
    budget: adapter parameters over the convolutions' parameters. iterations: at most 250 in the
    paper. order: of the Butterworth kernel. labels: false takes the float network for a teacher.
    """

    bits: int = 4
    k: float | None = 3.0
    budget: float = 0.05
    iterations: int = 250
    adapter_bits: int = 8
    order: int = 4
    start: float = 0.9
    lr: float = 0.01
    gamma: float = 1.0
    clip: float = 0.2
    labels: bool = True

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise SubbyteError(f"bits={self.bits!r}; use 1 to 8")
        if not 0 <= self.budget <= 1:
            raise SubbyteError(f"budget={self.budget!r}; use a share from 0 to 1")
        if self.iterations < 1:
            raise SubbyteError(f"iterations={self.iterations!r}; use 1 or more")
        if not 0 < self.start <= 1:
            raise SubbyteError(f"start={self.start!r}; use a share of the rank above 0, up to 1")

    @property
    def solver(self) -> KSigma:
        return KSigma(self.k)


def butterworth(r: Tensor, n: int, order: int) -> Tensor:
    """The normalised kernel at i / n for i = 1 .. n; [n], 1 at first and falling."""
    f = torch.arange(1, n + 1, dtype=r.dtype) / n
    kernel = 1 / (1 + (f / r) ** (2 * order)).sqrt()
    return kernel / kernel.max()


class _Searched(nn.Module):
    """A convolution's weight with a soft number of adapter ranks."""

    def __init__(
        self, matrix: Tensor, quantized: Tensor, site: Site, method: PublishedCoRa
    ) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(matrix - quantized, full_matrices=False)
        self.u, self.s, self.vh, self.quantized = u, s, vh, quantized
        self.shape, self.order = site.shape, method.order
        self.r = nn.Parameter(torch.tensor(method.start))

    @property
    def full(self) -> int:
        return len(self.s)

    def forward(self, _: Tensor) -> Tensor:
        kernel = butterworth(self.r, self.full, self.order)
        product = (self.u * (self.s * kernel.square())) @ self.vh
        return (self.quantized + product).reshape(self.shape)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        self.r.clamp_(1 / self.full, 1.0)

    def rank(self) -> int:
        return math.ceil(self.full * float(self.r.detach()))


def search_ranks(
    model: nn.Module,
    sites: Mapping[str, Site],
    images: Examples,
    labels: Tensor | None,
    method: PublishedCoRa,
    generator: torch.Generator,
) -> dict[str, int]:
    """The rank of each convolution's adapter; the model stays as it is.

    Raises SubbyteError if the method wants labels and there are none.
    """
    if method.labels and labels is None:
        raise SubbyteError(
            "the published rank search learns from labels and the calibration has none; give "
            "(inputs, labels) pairs, or labels=False for the float network as a teacher"
        )
    if isinstance(images, Ragged):
        raise SubbyteError(
            "the published rank search needs calibration examples of one shape; pad or crop them"
        )
    convolutions = {name: site for name, site in sites.items() if site.type in _CONVOLUTIONS}
    if not convolutions:
        return {}
    student, searched = _student(model, convolutions, method)
    total = sum(site.n_weights for site in convolutions.values())
    parts = [
        (w.r, w.full * (s.shape[0] + s.n_weights // s.shape[0]) / total)
        for s, w in ((convolutions[n], w) for n, w in searched.items())
    ]
    optimizer = torch.optim.Adam([r for r, _ in parts], lr=method.lr)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(method.iterations):
        if len(order) < min(_BATCH, len(images)):
            order = torch.randperm(len(images), generator=generator)
        index, order = order[:_BATCH], order[_BATCH:]
        with torch.no_grad():
            target = call(model, images[index]).softmax(-1) if labels is None else labels[index]
        with torch.enable_grad():
            used = torch.stack([r * share for r, share in parts]).sum()
            task = F.cross_entropy(call(student, images[index]), target)
            loss = task + method.gamma * (used - method.budget).relu().exp()
            optimizer.zero_grad()
            loss.backward()
        for r, _ in parts:
            assert r.grad is not None
            r.grad.clamp_(-method.clip, method.clip)
        optimizer.step()
        for weight in searched.values():
            weight.keep_in_range()
    return {name: weight.rank() for name, weight in searched.items()}


def _student(
    model: nn.Module, sites: Mapping[str, Site], method: PublishedCoRa
) -> tuple[nn.Module, dict[str, _Searched]]:
    student = copied(model).train()
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    searched = {}
    for name, site in sites.items():
        owner = student.get_submodule(site.owner)
        matrix = as_matrix(owner.get_parameter(site.parameter).detach())
        quantized = method.solver.solve(matrix, None, 2**method.bits).dequantize()
        searched[name] = _Searched(matrix, quantized, site, method)
        parametrize.register_parametrization(owner, site.parameter, searched[name], unsafe=True)
    return student, searched


def published_layers(
    model: nn.Module,
    sites: Mapping[str, Site],
    planned: Sequence[PlannedLayer],
    method: PublishedCoRa,
) -> dict[str, QuantizedLayer]:
    """k-sigma codes and plain SVD adapters of the planned levels and ranks."""
    layers = {}
    for layer in planned:
        if not layer.levels:
            continue
        site = sites[layer.name]
        weight = getattr(model.get_submodule(site.owner), site.parameter).detach()
        matrix = as_matrix(weight, site.channel_axis)
        codes, adapter = method.solver.solve(matrix, None, layer.levels), None
        if layer.rank:
            plain, error = Metric(None, None, 1, matrix.shape[1]), matrix - codes.dequantize()
            adapter = fit_adapter(error, plain, layer.rank, method.adapter_bits)
        bias = bias_of(model, site)
        layers[layer.name] = QuantizedLayer(weight_of(codes, site), bias, adapter)
    return layers


def equivalent_bits(plan: Plan, method: PublishedCoRa) -> float:
    """The paper's count: bits + adapter bits * adapter parameters / all parameters; no scales."""
    weights = sum(layer.n_weights for layer in plan.quantized)
    extra = sum(
        layer.rank * (layer.shape[0] + layer.n_weights // layer.shape[0])
        for layer in plan.quantized
    )
    return method.bits + method.adapter_bits * extra / weights
