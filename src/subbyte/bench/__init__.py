"""How fast packed layers are on this machine, against float layers and against the machine."""

from subbyte.bench.measure import bench
from subbyte.bench.report import BenchReport, LayerBench, Times, table
from subbyte.bench.roofs import Roofs, measure_roofs
from subbyte.bench.targets import from_network, from_shapes, parse_numbers, parse_shapes
from subbyte.bench.timing import Spread, in_turn, spread

__all__ = [
    "BenchReport",
    "LayerBench",
    "Roofs",
    "Spread",
    "Times",
    "bench",
    "from_network",
    "from_shapes",
    "in_turn",
    "measure_roofs",
    "parse_numbers",
    "parse_shapes",
    "spread",
    "table",
]
