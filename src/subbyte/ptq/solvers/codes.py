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
from dataclasses import replace

import torch
from torch import Tensor

from subbyte.core.functional import (
    FLOAT16_MAX,
    decode,
    in_groups,
    nearest_level,
    round_scale,
    spread,
)
from subbyte.core.grids import Grid, PerChannel, PerGroup, PerTensor, ScaleDomain, uniform
from subbyte.core.rtn import COARSE, MOST, rtn
from subbyte.core.tensors import QuantizedTensor
from subbyte.errors import SubbyteError

DAMPING = 0.01  # of the gram's mean diagonal
_BLOCK = 128
_LEAST_PEAK = 2.0**-16  # of |w| in a row: its scale may be a quarter of that
_MOST_PEAK = FLOAT16_MAX / MOST
_COMPENSATED = (1.0, 0.8, 0.88, 0.95, 1.06, 1.13)  # times the best plain scale
_SEARCH_WORK = 2**32  # rows * width^2 above which one scale is compensated, not several
_NEAREST_AT_ONCE = 2**18  # weights
_AT_ONCE = 2**22  # weights of a part of a matrix: a table of 28 million takes gigabytes at once


def channel_grid(levels: int, channel_axis: int, domain: ScaleDomain = ScaleDomain.FLOAT16) -> Grid:
    """What post-training codes live on: uniform levels, a scale per channel."""
    return uniform(levels, PerChannel(channel_axis), domain)


def matrix_grid(matrix: Tensor, levels: int, group: int | None) -> Grid:
    """The grid for a matrix [out, width]: a scale per row, or per group of inputs."""
    sharing = PerChannel(0) if group is None else PerGroup(group)
    return uniform(levels, sharing, scale_domain(matrix, group))


def scale_domain(matrix: Tensor, group: int | None = None) -> ScaleDomain:
    """float16; float32 where a row [out, width], or a group of its inputs, needs a scale that
    float16 has not, or has only with an error above 2^-7."""
    peaks = (matrix if group is None else in_groups(matrix, group)).abs().amax(1)
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


def nearest(matrix: Tensor, grid: Grid) -> QuantizedTensor:
    """`rtn` of a few rows at a time, whose errors stay in the processor's cache: of a matrix
    [out, width] on its grid, a scale per row or per group of inputs."""
    rows = max(1, _NEAREST_AT_ONCE // matrix.shape[1])
    found = [rtn(part, None, grid) for part in matrix.split(rows)]
    codes, scale = torch.cat([x.codes for x in found]), torch.cat([x.scale for x in found])
    return QuantizedTensor(codes, scale, grid)


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

    matrix: float [out, width]. gram: [groups, width, width]. grid: of the matrix, per channel or
    per group of inputs.
    sweeps: rounds of coordinate descent, each after a refit of the scales. factors: scales tried,
    times the one of `rtn`; a large layer tries the first only.
    """
    metric = damped(gram.double())
    inverse = _ordered_factors(metric)
    if matrix.numel() * matrix.shape[1] > _SEARCH_WORK:
        factors = factors[:1]
    rows = len(matrix) if len(gram) > 1 else max(1, _AT_ONCE // matrix.shape[1])
    found = []
    for part in matrix.split(rows):
        best = _Best(part, metric, grid, rtn(part, gram, grid))
        _compensated(best, inverse, factors)
        for _ in range(sweeps):
            best.offer(_refit(part, best.codes, best.scale, metric, grid), best.codes)
            best.offer(best.scale, _descend(part, best.codes, best.scale, metric, grid))
        found.append(best)
    codes, scale = torch.cat([x.codes for x in found]), torch.cat([x.scale for x in found])
    return QuantizedTensor(codes, scale, grid)


class _Best:
    """The best codes and scales of each row so far."""

    def __init__(self, matrix: Tensor, metric: Tensor, grid: Grid, start: QuantizedTensor) -> None:
        self.matrix, self._metric, self.grid = matrix, metric, grid
        self.codes, self.scale = start.codes, start.scale
        self.error = self._error(start.codes, start.scale)

    def offer(self, scale: Tensor, codes: Tensor) -> None:
        error = self._error(codes, scale)
        better = error < self.error
        self.codes = torch.where(better[:, None], codes, self.codes)
        by_row = (len(better), -1)
        found = torch.where(better[:, None], scale.reshape(by_row), self.scale.reshape(by_row))
        self.scale = found.flatten()
        self.error = torch.where(better, error, self.error)

    def _error(self, codes: Tensor, scale: Tensor) -> Tensor:
        return row_errors(self.matrix - decode(codes, scale, self.grid), self._metric)


def _compensated(best: _Best, inverse: tuple[Tensor, Tensor], factors: Sequence[float]) -> None:
    """Offer the codes of GPTQ for each of the scales, `factors` times the one at the start."""
    domain = best.grid.scale_domain
    tried = torch.stack([round_scale(best.scale * f, domain) for f in factors])
    for scale, codes in zip(
        tried, _compensate(best.matrix, tried, best.grid, inverse), strict=True
    ):
        best.offer(scale, codes)


def _ordered_factors(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Columns by falling diagonal [groups, width], and the upper Cholesky factor of the inverse."""
    order = metric.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    ordered = torch.stack([m[o][:, o] for m, o in zip(metric, order, strict=True)])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return order, torch.linalg.cholesky(inverse, upper=True)


def _compensate(
    matrix: Tensor, scales: Tensor, grid: Grid, inverse: tuple[Tensor, Tensor]
) -> Tensor:
    """GPTQ for several scales at once: each column's error is spread over the columns still open.

    matrix: [out, width]. scales: [tries, scales]. inverse: `_ordered_factors` of the metric.
    Returns codes [tries, out, width].
    """
    order, upper = inverse[0], inverse[1].float()
    groups, width = order.shape
    per_group = len(matrix) // groups
    units = torch.stack([_units(scale, matrix.shape, grid) for scale in scales])

    def grouped(x: Tensor) -> Tensor:
        """[tries, out, width] as [groups, tries * out / groups, width]."""
        return x.reshape(-1, groups, per_group, width).transpose(0, 1).reshape(groups, -1, width)

    rest = grouped(matrix.expand(len(scales), *matrix.shape))
    index = order[:, None, :].expand_as(rest)
    rest, unit = rest.gather(2, index), grouped(units).gather(2, index)
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = rest[:, :, start:end].transpose(1, 2).contiguous()  # columns are contiguous
        units_here = unit[:, :, start:end].transpose(1, 2).contiguous()
        errors = torch.empty_like(block)
        local = upper[:, start:end, start:end]
        for j in range(end - start):
            column, scale = block[:, j], units_here[:, j]
            code, value = nearest_level(column / scale, grid)
            codes[:, :, start + j] = code
            error = (column - value * scale) / local[:, j, j, None]
            errors[:, j] = error
            block[:, j + 1 :] -= local[:, j, j + 1 :, None] * error[:, None, :]
        rest[:, :, end:] -= errors.transpose(1, 2) @ upper[:, start:end, end:]
    found = torch.empty_like(codes).scatter_(2, index, codes)
    found = found.reshape(groups, len(scales), per_group, width).transpose(0, 1)
    return found.reshape(len(scales), *matrix.shape)


def _units(scale: Tensor, shape: Sequence[int], grid: Grid) -> Tensor:
    """The scale of every weight, of the matrix's shape; 1 in place of 0."""
    return spread(torch.where(scale > 0, scale, torch.ones_like(scale)), shape, grid).expand(shape)


def _refit(matrix: Tensor, codes: Tensor, scale: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """The scales of each row with the least error for its codes.

    One scale: (w H q) / (q H q). Several: the solution s of A s = b, with A_gh = q_g H q_h and
    b_g = q_g H w over the parts q_g of the row's codes.
    """
    if isinstance(grid.granularity, PerGroup):
        return _refit_groups(matrix, codes, scale, metric, grid)
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


_REFIT_VALUES = 2**25  # float64 values at once


def _refit_groups(
    matrix: Tensor, codes: Tensor, scale: Tensor, metric: Tensor, grid: Grid
) -> Tensor:
    """`_refit` for scales per group; a row of which one scale would not be positive stays."""
    assert isinstance(grid.granularity, PerGroup)
    size, width = grid.granularity.size, codes.shape[1]
    per_row = grid.granularity.per_row(width)
    q = _levels(codes, grid).double()
    target = (matrix.double().reshape(len(metric), -1, width) @ metric).reshape(matrix.shape)
    b = in_groups(target * q, size).sum(1).reshape(-1, per_row)
    found = scale.reshape(-1, per_row).double()
    rows = torch.arange(len(matrix)).split(max(1, _REFIT_VALUES // (per_row * width)))
    per_metric = len(matrix) // len(metric)
    for own in rows:
        a = torch.stack(
            [_products(q[own], own // per_metric, metric, g, size) for g in range(per_row)], 1
        )
        ridge = 1e-9 * a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        a = a + ridge[:, None, None] * torch.eye(per_row, dtype=a.dtype)
        fitted, failed = torch.linalg.solve_ex(a, b[own][:, :, None])
        fitted = fitted[:, :, 0]
        usable = (failed == 0) & (fitted.isfinite() & (fitted > 0)).all(1)
        found[own] = torch.where(usable[:, None], fitted, found[own])
    return round_scale(found.flatten().float(), grid.scale_domain)


def _products(q: Tensor, which: Tensor, metric: Tensor, g: int, size: int) -> Tensor:
    """q_g H q_h for every part h of the rows; [rows, parts]. which: the metric of each row."""
    part = q[:, g * size : (g + 1) * size]
    if len(metric) == 1:
        through = part @ metric[0, g * size : (g + 1) * size]
    else:
        through = torch.einsum("ri,riw->rw", part, metric[which, g * size : (g + 1) * size])
    return in_groups(through * q, size).sum(1).reshape(len(q), -1)


def _levels(codes: Tensor, grid: Grid) -> Tensor:
    """The level of each code, float32."""
    return decode(codes, torch.ones(1), replace(grid, granularity=PerTensor()))


def _descend(matrix: Tensor, codes: Tensor, scale: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """One sweep: every code in turn becomes the best one while all others stay."""
    groups, _, width = metric.shape
    h = metric.float()
    unit = _units(scale, codes.shape, grid)
    q, w, unit = (x.reshape(groups, -1, width) for x in (_levels(codes, grid) * unit, matrix, unit))
    gradient = (w - q) @ h
    new = codes.clone().reshape(q.shape)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = gradient[:, :, start:end].transpose(1, 2).contiguous()
        before = q[:, :, start:end].transpose(1, 2).contiguous()
        units_here = unit[:, :, start:end].transpose(1, 2).contiguous()
        moves = torch.empty_like(block)
        local = h[:, start:end, start:end]
        for j in range(end - start):
            best, scale_here = before[:, j] + block[:, j] / local[:, j, j, None], units_here[:, j]
            code, value = nearest_level(best / scale_here, grid)
            new[:, :, start + j] = code
            moves[:, j] = value * scale_here - before[:, j]
            block[:, j + 1 :] -= local[:, j, j + 1 :, None] * moves[:, j, None, :]
        gradient[:, :, end:] -= moves.transpose(1, 2) @ h[:, start:end, end:]
    return new.reshape(codes.shape)


def quick_errors(
    matrix: Tensor, gram: Tensor | None, choices: Sequence[tuple[int, int | None]]
) -> Tensor:
    """e_o H e_o' of every row after one pass of compensation, float64 [choices, out].

    choices: numbers of uniform levels and group sizes, all of which share the pass. gram:
    [1, width, width]; None for rounding to nearest.
    """
    grids = [matrix_grid(matrix, n, size) for n, size in choices]
    found = [rtn(matrix, gram, grid, COARSE) for grid in grids]
    if gram is None:
        return torch.stack([row_errors(matrix - q.dequantize(), None) for q in found])
    metric = damped(gram.double())
    order, upper = _ordered_factors(metric)
    own, upper = order[0], upper[0].float()
    units = torch.stack(
        [_units(q.scale, matrix.shape, q.grid) for q in found]
    )  # [choices, out, width]
    half = torch.tensor([(n - 1) / 2 for n, _ in choices])[:, None]
    rest = matrix.expand_as(units)[:, :, own].clone()
    units = units[:, :, own]
    errors = torch.empty_like(rest)
    for start in range(0, len(own), _BLOCK):
        end = min(start + _BLOCK, len(own))
        block = rest[:, :, start:end].permute(2, 0, 1).contiguous()
        unit = units[:, :, start:end].permute(2, 0, 1).contiguous()
        local = upper[start:end, start:end]
        lost = torch.empty_like(block)
        for j in range(end - start):
            value = uniform_values(block[j] / unit[j], half) * unit[j]
            error = (block[j] - value) / local[j, j]
            lost[j] = error
            block[j + 1 :] -= local[j, j + 1 :, None, None] * error
        errors[:, :, start:end] = lost.permute(1, 2, 0)
        rest[:, :, end:] -= errors[:, :, start:end] @ upper[start:end, end:]
    # The compensated error is e = lost U, and e H e' = |lost|^2 since H^-1 = U' U.
    return errors.double().square().sum(2)


def uniform_values(x: Tensor, half: Tensor) -> Tensor:
    """The nearest of the uniform levels from -1 to 1 with steps of 1 / half."""
    code = ((x * half + half + 0.5).floor()).clamp(min=0)
    return torch.minimum(code, 2 * half) / half - 1


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
