"""How codes are found for one weight. A solver is one class here and one line in SOLVERS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from torch import Tensor

from subbyte.core.grids import PerChannel
from subbyte.core.sites import Site
from subbyte.core.tensors import QuantizedTensor, as_weight
from subbyte.errors import SubbyteError
from subbyte.ptq.solvers.codes import gptq, k_sigma, matrix_grid, nearest


class Solver(Protocol):
    """A frozen dataclass of options.

    compensates: whether it uses the inputs, so that solving layers in order has something to give.
    """

    compensates: ClassVar[bool]

    def solve(
        self, matrix: Tensor, gram: Tensor | None, levels: int, group: int | None = None
    ) -> QuantizedTensor:
        """Codes of a float matrix [out, width], its channels on axis 0.

        gram: float64 [groups, width, width] of the inputs, None where nothing is known of them.
        levels: 2 to 256. group: inputs that share a scale, None for a scale per channel.
        """
        ...


@dataclass(frozen=True, slots=True)
class RTN:
    """Round to nearest, a scale per channel or group; the inputs do not matter."""

    compensates: ClassVar[bool] = False

    def solve(
        self, matrix: Tensor, gram: Tensor | None, levels: int, group: int | None = None
    ) -> QuantizedTensor:
        return nearest(matrix, matrix_grid(matrix, levels, group))


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Error-compensated rounding, a scale per channel or group; round to nearest without inputs."""

    compensates: ClassVar[bool] = True

    def solve(
        self, matrix: Tensor, gram: Tensor | None, levels: int, group: int | None = None
    ) -> QuantizedTensor:
        grid = matrix_grid(matrix, levels, group)
        return nearest(matrix, grid) if gram is None else gptq(matrix, gram, grid)


@dataclass(frozen=True, slots=True)
class KSigma:
    """CoRa's published quantizer: one scale per tensor, levels that need not be symmetric.

    k: standard deviations of the range, None for least to largest.
    """

    k: float | None = 3.0
    compensates: ClassVar[bool] = False

    def solve(
        self, matrix: Tensor, gram: Tensor | None, levels: int, group: int | None = None
    ) -> QuantizedTensor:
        if group is not None:
            raise SubbyteError(f"group={group}: the k-sigma quantizer has one scale per tensor")
        return k_sigma(matrix, levels, self.k)


SOLVERS: dict[str, type[Solver]] = {"gptq": GPTQ, "rtn": RTN, "k-sigma": KSigma}
"""Names, as in `CoRa(codes="gptq")`, -> the frozen dataclass of the solver's options."""


def weight_of(codes: QuantizedTensor, site: Site) -> QuantizedTensor:
    """The layer's weight of a matrix that was solved."""
    grid = codes.grid
    if isinstance(grid.granularity, PerChannel):
        grid = replace(grid, granularity=PerChannel(site.channel_axis))
    stored = as_weight(codes.codes, site.shape, site.channel_axis).contiguous()
    return QuantizedTensor(stored, codes.scale, grid)
