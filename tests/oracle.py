"""Float64 references with derived bounds: what float32 may differ by, and nothing more.

A float32 dot product of length n, in any order of summation, differs from the exact one by at most
gamma_n |x||w| with gamma_n = n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1). The decoded weight is rounded once and the bias added once: n + 2.
"""

import torch
from torch import Tensor

U = 2.0**-24


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def assert_within(y: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Every element finite and within its own bound; NaN fails."""
    assert y.shape == exact.shape
    assert y.isfinite().all()
    error = (y.double() - exact).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(0.0)
    assert (error <= bound).all(), f"bound exceeded by {worst:.3e}"


def exact_weight(tensor) -> Tensor:
    """Float64 value of a QuantizedTensor, computed here with a table and no library code."""
    levels = torch.tensor(tensor.grid.levels, dtype=torch.float32).double()
    axis = getattr(tensor.grid.granularity, "axis", 0)
    shape = [1] * tensor.codes.ndim
    shape[axis] = -1
    return levels[tensor.codes.long()] * tensor.scale.double().reshape(shape)
