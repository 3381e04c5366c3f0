"""`subbyte bench`: times of packed layers on this machine."""

from __future__ import annotations

from typing import Any

from subbyte.bench import bench as measure
from subbyte.bench import from_network, from_shapes, parse_numbers, parse_shapes, table
from subbyte.commands import options as o
from subbyte.commands.networks import packed_network
from subbyte.commands.output import show
from subbyte.errors import SubbyteError


def bench(
    file: o.MaybeFile = None,
    shapes: o.Shapes = None,
    levels: o.ShapeLevels = 3,
    model: o.Model = None,
    input_: o.Input = None,
    batch: o.Batch = "1",
    precision: o.Precision = "auto",
    threads: o.Threads = None,
    seconds: o.Seconds = 20.0,
    json_: o.Json = False,
) -> None:
    """Time packed layers on this machine, against float32 and against what the machine can do."""
    if (file is None) == (shapes is None):
        raise SubbyteError("bench takes a packed file or --shapes OUTxIN, one of the two")
    batches = parse_numbers("--batch", batch)
    kind: Any = precision
    if shapes is not None:
        if input_ is not None or model is not None:
            raise SubbyteError(
                "--input and --model go with a packed file; --shapes says how wide layers are"
            )
        net, example = from_shapes(parse_shapes(shapes), levels, kind)
        name = f"Linear layers of {levels} levels"
    else:
        assert file is not None
        size = None if input_ is None else parse_numbers("--input", input_)
        net, example = from_network(packed_network(file, model, kind), str(file), size)
        name = str(file)
    report = measure(net, example, target=name, batches=batches, threads=threads, seconds=seconds,
                     whole=shapes is None)  # fmt: skip
    show(report, table, json_)
