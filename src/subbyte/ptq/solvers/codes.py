"""Codes for a given weight: round to nearest, error-compensated rounding, CoRa's k-sigma quantizer.

Every solver takes the weight as a matrix [out, width] and the gram of its inputs, and minimizes

    sum over rows of  e_o H e_o',   e = w - w_hat         (H the identity without inputs)

GPTQ: Frantar, Ashkboos, Hoefler and Alistarh, arXiv:2210.17323. Ours on top of it: any number of
levels; scales searched for the error after compensation and refitted to the codes in closed form;
then sweeps of coordinate descent, each of which can only lower the error.
K-sigma: arXiv:2408.00923, the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subbyte.core.functional import FLOAT16_MAX, decode, nearest_level, round_scale
from subbyte.core.grids import Grid, PerChannel, PerTensor, ScaleDomain, uniform
from subbyte.core.rtn import MOST, rtn
from subbyte.core.tensors import QuantizedTensor
from subbyte.errors import SubbyteError

DAMPING = 0.01  # of the gram's mean diagonal
_BLOCK = 128
_LEAST_PEAK = 2.0**-16  # of |w| in a row: its scale may be a quarter of that
_MOST_PEAK = FLOAT16_MAX / MOST
_COMPENSATED = (1.0, 0.8, 0.88, 0.95, 1.06, 1.13)  # times the best plain scale
_SEARCH_WORK = 2**32  # rows * width^2 above which one scale is compensated, not several


def channel_grid(levels: int, channel_axis: int, domain: ScaleDomain = ScaleDomain.FLOAT16) -> Grid:
    """What post-training codes live on: uniform levels, a scale per channel."""
    return uniform(levels, PerChannel(channel_axis), domain)


def scale_domain(matrix: Tensor) -> ScaleDomain:
    """float16; float32 where a row [out, width] needs a scale that float16 has not, or has only
    with an error above 2^-7."""
    peaks = matrix.abs().amax(1)
    peaks = peaks[peaks > 0]
    if not len(peaks) or (peaks.min() >= _LEAST_PEAK and peaks.max() <= _MOST_PEAK):
        return ScaleDomain.FLOAT16
    return ScaleDomain.FLOAT32


def tensor_grid(levels: int) -> Grid:
    """Uniform levels, one float32 scale for the weight."""
    return uniform(levels, PerTensor(), ScaleDomain.FLOAT32)


def damped(gram: Tensor) -> Tensor:
    """gram [groups, width, width] with DAMPING of its mean diagonal added; positive definite."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # a layer that only ever sees 0
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + DAMPING * mean[:, None, None] * eye


def row_errors(error: Tensor, gram: Tensor | None) -> Tensor:
    """e_o H e_o' of each row of error [out, width]; gram [groups, width, width]; float64 [out]."""
    error = error.double()
    if gram is None:
        return error.square().sum(1)
    grouped = error.reshape(len(gram), -1, error.shape[1])
    return ((grouped @ gram.double()) * grouped).sum(2).flatten()


# ---------------------------------------------------------------- GPTQ


def gptq(
    matrix: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    sweeps: int = 4,
    factors: Sequence[float] = _COMPENSATED,
) -> QuantizedTensor:
    """Error-compensated codes; never worse than `rtn` in the metric of the gram.

    matrix: float [out, width]. gram: [groups, width, width]. grid: of the matrix, per channel.
    sweeps: rounds of coordinate descent, each after a refit of the scales. factors: scales tried,
    times the one of `rtn`; a large layer tries the first only.
    """
    metric = damped(gram.double())
    start = rtn(matrix, gram, grid)
    best = _Best(matrix, metric, grid, start)
    if matrix.numel() * matrix.shape[1] > _SEARCH_WORK:
        factors = factors[:1]
    tried = torch.stack([round_scale(start.scale * f, grid.scale_domain) for f in factors])
    for scale, codes in zip(tried, _compensate(matrix, tried, grid, metric), strict=True):
        best.offer(scale, codes)
    for _ in range(sweeps):
        scale = _refit(matrix, best.codes, best.scale, metric, grid)
        best.offer(scale, best.codes)
        best.offer(best.scale, _descend(matrix, best.codes, best.scale, metric, grid))
    return QuantizedTensor(best.codes, best.scale, grid)


class _Best:
    """The best codes and scale of each row so far."""

    def __init__(self, matrix: Tensor, metric: Tensor, grid: Grid, start: QuantizedTensor) -> None:
        self._matrix, self._metric, self._grid = matrix, metric, grid
        self.codes, self.scale = start.codes, start.scale
        self.error = self._error(start.codes, start.scale)

    def offer(self, scale: Tensor, codes: Tensor) -> None:
        error = self._error(codes, scale)
        better = error < self.error
        self.codes = torch.where(better[:, None], codes, self.codes)
        self.scale = torch.where(better, scale, self.scale)
        self.error = torch.where(better, error, self.error)

    def _error(self, codes: Tensor, scale: Tensor) -> Tensor:
        return row_errors(self._matrix - decode(codes, scale, self._grid), self._metric)


def _ordered_factors(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Columns by falling diagonal [groups, width], and the upper Cholesky factor of the inverse."""
    order = metric.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    ordered = torch.stack([m[o][:, o] for m, o in zip(metric, order, strict=True)])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return order, torch.linalg.cholesky(inverse, upper=True)


def _compensate(matrix: Tensor, scales: Tensor, grid: Grid, metric: Tensor) -> Tensor:
    """GPTQ for several scales at once: each column's error is spread over the columns still open.

    matrix: [out, width]. scales: [tries, out]. Returns codes [tries, out, width].
    """
    order, upper = _ordered_factors(metric)
    upper = upper.float()
    groups, width = order.shape
    per_group = len(matrix) // groups
    # In units of the scale, every row has the same levels.
    rows = (matrix / _nonzero(scales)[:, :, None]).reshape(-1, groups, per_group, width)
    rest = rows.transpose(0, 1).reshape(groups, -1, width)
    index = order[:, None, :].expand_as(rest)
    rest = rest.gather(2, index)
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = rest[:, :, start:end].transpose(1, 2).contiguous()  # columns are contiguous
        errors = torch.empty_like(block)
        local = upper[:, start:end, start:end]
        for j in range(end - start):
            column = block[:, j]
            code, value = nearest_level(column, grid)
            codes[:, :, start + j] = code
            error = (column - value) / local[:, j, j, None]
            errors[:, j] = error
            block[:, j + 1 :] -= local[:, j, j + 1 :, None] * error[:, None, :]
        rest[:, :, end:] -= errors.transpose(1, 2) @ upper[:, start:end, end:]
    found = torch.empty_like(codes).scatter_(2, index, codes)
    found = found.reshape(groups, len(scales), per_group, width).transpose(0, 1)
    return found.reshape(len(scales), *matrix.shape)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _refit(matrix: Tensor, codes: Tensor, scale: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """The scale of each row with the least error for its codes: (w H q) / (q H q)."""
    q = (
        decode(codes, torch.ones_like(scale), grid)
        .double()
        .reshape(len(metric), -1, codes.shape[1])
    )
    w = matrix.double().reshape(q.shape)
    hq = q @ metric
    fitted = ((w * hq).sum(2) / (q * hq).sum(2)).flatten()
    usable = fitted.isfinite() & (fitted > 0)
    return round_scale(torch.where(usable, fitted.float(), scale), grid.scale_domain)


def _descend(matrix: Tensor, codes: Tensor, scale: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """One sweep: every code in turn becomes the best one while all others stay."""
    groups, _, width = metric.shape
    h = metric.float()
    q = decode(codes, torch.ones_like(scale), grid)  # in units of the scale, as all below
    w = matrix / _nonzero(scale)[:, None]
    q, w = (x.reshape(groups, -1, width) for x in (q, w))
    gradient = (w - q) @ h
    new = codes.clone().reshape(q.shape)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = gradient[:, :, start:end].transpose(1, 2).contiguous()
        before = q[:, :, start:end].transpose(1, 2).contiguous()
        moves = torch.empty_like(block)
        local = h[:, start:end, start:end]
        for j in range(end - start):
            code, value = nearest_level(before[:, j] + block[:, j] / local[:, j, j, None], grid)
            new[:, :, start + j] = code
            moves[:, j] = value - before[:, j]
            block[:, j + 1 :] -= local[:, j, j + 1 :, None] * moves[:, j, None, :]
        gradient[:, :, end:] -= moves.transpose(1, 2) @ h[:, start:end, end:]
    return new.reshape(codes.shape)


# ---------------------------------------------------------------- the paper's quantizer


def k_sigma(matrix: Tensor, levels: int, k: float | None) -> QuantizedTensor:
    """CoRa's quantizer: uniform, asymmetric, one scale a tensor; arXiv:2408.00923, released code.

        s = (b - a) / (levels - 1)      z = int(clamp(-a / s, 0, levels - 1))
        q = round(clamp(z + x / s, 0, levels - 1))       value s (q - z)

    [a, b] is mean -+ k standard deviations, or for k None the least and the largest weight.
    Rounding is to even, as torch.round. The paper's levels are 2^bits. Raises SubbyteError
    for levels outside 2 to 256.
    """
    if not 2 <= levels <= 256:
        raise SubbyteError(f"levels={levels!r}; the k-sigma quantizer takes 2 to 256")
    top = levels - 1
    if k is None:
        low, high = matrix.min(), matrix.max()
    else:
        low, high = matrix.mean() - k * matrix.std(), matrix.mean() + k * matrix.std()
    step = (high - low) / top
    if not float(step) > 0:  # all weights equal
        step = torch.ones_like(step)
    zero = int((-low / step).clamp(0, top))
    codes = (zero + matrix / step).clamp(0, top).round().to(torch.uint8)
    grid = Grid(tuple(float(i - zero) for i in range(top + 1)))
    return QuantizedTensor(codes, step.reshape(1).float(), grid)
