"""What every exporter takes and gives.

An exporter is a pure function from a `Request` to the bytes of one or more files; `export` writes
them, so that no target can leave half a file. It reads the program of the network (`Request.read`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.graph.layers import WHOLE
from subbyte.graph.network import PROGRAM
from subbyte.graph.program import DTYPES, LAYER, Program
from subbyte.graph.trace import Example, traced
from subbyte.modules import PackedWeight

FORMS = ("auto", "small", "fast")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A network as exporters read it.

    net: in eval mode; has the program's layers by name. state: the tensors that operations read
    themselves, by their name in the program. example: inputs in the program's order, a batch of at
    least one.
    """

    program: Program
    net: nn.Module
    state: Mapping[str, Tensor]
    example: tuple[Tensor, ...]
    named: bool = False  # forward takes its inputs by name


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What to export. name: of the file, without its suffix. calibration: batches of inputs."""

    net: nn.Module
    name: str
    form: str = "auto"
    example: Example | None = None
    calibration: Sequence[Example] | None = None

    def read(self) -> Source:
        """The network's program. Raises SubbyteError for a network that cannot be traced."""
        program, state = _program(self.net, self.example)
        example = in_order(program, self.example)
        named = isinstance(self.example, Mapping)
        return Source(program, self.net, state, example or made_up(program, state), named)


@dataclass(frozen=True, slots=True)
class Built:
    """Files by suffix, the target's own first. layers: (name of the layer, stored as).

    twin: makes the same network in float32, in the same format, to compare its time with.
    """

    files: Mapping[str, bytes]
    form: str
    layers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    twin: Callable[[], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """What the file computes where it runs, beside the packed network, on the same inputs.

    difference: the largest of an output, over the largest output. agreement: share of equal argmax
    over the last dimension. Times in milliseconds, medians: of the file, of the packed network,
    and of the same network in float32 where the file runs.
    """

    runtime: str
    packed_bytes: int
    difference: float
    agreement: float
    ms: float
    packed_ms: float
    float_ms: float


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` has written. n_bytes: of all its files. layers: (name, stored as)."""

    path: str
    target: str
    form: str
    n_bytes: int
    layers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    check: Check | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Exporter:
    """One kind of file. forms: what `form` may be. packages: needed; extra: what installs them.

    check: runs the written file, by its path, beside the network; None where it cannot.
    """

    suffix: str
    what: str
    forms: tuple[str, ...]
    build: Callable[[Request], Built]
    packages: tuple[str, ...] = ()
    extra: str = ""
    check: Callable[[Request, Built, str], Check | None] | None = None

    def require(self) -> None:
        """Raises SubbyteError, naming the extra, if a package that the exporter needs is absent."""
        for package in self.packages:
            if not is_installed(package):
                raise SubbyteError(
                    f"a {self.suffix} file needs the package '{package}': pip install "
                    f"'subbyte[{self.extra}]'"
                )


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _program(net: nn.Module, example: Example | None) -> tuple[Program, dict[str, Tensor]]:
    """The program that the network was opened from, or else is traced to; and what it reads."""
    program, constants = getattr(net, "meta", {}).get(PROGRAM), dict[str, Tensor]()
    if program is None:
        if example is None:
            raise SubbyteError(
                "the network holds no program; give export an input as example=, or save the file "
                "with one"
            )
        _check_layers(net)
        program, constants = traced(net, example)
    held: dict[str, Tensor] = {**dict(net.named_parameters(remove_duplicate=False))}
    held |= {**dict(net.named_buffers(remove_duplicate=False)), **constants}
    return program, {name: held[name].detach() for name in sorted(program.state_names)}


def _check_layers(net: nn.Module) -> None:
    """Raises SubbyteError for a packed layer that a program does not call whole, naming it."""
    for name, module in net.named_modules():
        if type(module) not in WHOLE and any(
            isinstance(m, PackedWeight) for m in module.children()
        ):
            kind = type(module).__name__.removeprefix("Packed")
            raise SubbyteError(
                f"layer '{name}' is a packed {kind}, which a program has no operator for; export "
                "the network around it"
            )


def in_order(program: Program, example: Example | None) -> tuple[Tensor, ...]:
    """An example's tensors in the order of the program's inputs; empty without an example."""
    if example is None:
        return ()
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, Mapping):
        return tuple(example[value.name] for value in program.inputs)
    return tuple(example)


def made_up(program: Program, state: Mapping[str, Tensor], n: int = 2) -> tuple[Tensor, ...]:
    """Inputs that the program takes, with n for each free size: normal floats, valid indices."""
    generator = torch.Generator().manual_seed(0)
    tables = _tables(program, state)
    found = []
    for value in program.inputs:
        size, dtype = [n if s is None else s for s in value.shape], DTYPES[value.dtype]
        if dtype.is_floating_point:
            found.append(torch.randn(size, generator=generator).to(dtype))
        elif value.name in tables:
            entries = tables[value.name]
            found.append(torch.randint(0, entries, size, generator=generator).to(dtype))
        else:  # a mask, most likely
            found.append(torch.ones(size, dtype=dtype))
    return tuple(found)


def _tables(program: Program, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Inputs that are indices -> entries of the smallest table that they index."""
    found: dict[str, int] = {}
    for node in program.nodes:
        if node.op == LAYER and program.layers[node.layer]["type"] == "Embedding":
            index, entries = node.args["x"], program.layers[node.layer]["num_embeddings"]
        elif node.op == "Gather" and "state" in (node.args["data"] or {}):
            index, entries = node.args["indices"], state[node.args["data"]["state"]].shape[0]
        else:
            continue
        name = index.get("value") if isinstance(index, dict) else None
        if name is not None:
            found[name] = min(entries, found.get(name, entries))
    return found
