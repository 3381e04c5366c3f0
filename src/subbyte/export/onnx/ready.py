"""A network made ready for ONNX: norms, sums and activations in its products, where that goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from subbyte.errors import SubbyteError
from subbyte.export.base import Source
from subbyte.graph.fuse import fuse
from subbyte.graph.network import module_of
from subbyte.graph.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """net: what the source computes, with the source's inputs and outputs."""

    source: Source
    net: fx.GraphModule

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Packed layers, and norms that are left, by name."""
        names = dict.fromkeys(str(n.target) for n in self.net.graph.nodes if n.op == "call_module")
        return {name: self.net.get_submodule(name) for name in names}

    def calling(self, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
        """The same network with these in the place of its layers."""
        made = fx.GraphModule(self.net, self.net.graph)
        for name, layer in layers.items():
            made.set_submodule(name, layer)
        return made.eval()


def prepared(source: Source) -> Ready:
    """Raises SubbyteError for a network that is not float32."""
    _check_types(source.program)
    layers = {name: source.net.get_submodule(name) for name in source.program.layers}
    net = module_of(source.program, layers, source.state)
    try:
        fused = fuse(net)
    except SubbyteError:
        return Ready(source, net)
    assert isinstance(fused, fx.GraphModule)
    return Ready(source, fused)


def _check_types(program: Program) -> None:
    for value in program.inputs:
        if value.dtype in ("float16", "bfloat16", "float64"):
            raise SubbyteError(
                f"input '{value.name}' is {value.dtype}; an exported network takes float32: call "
                "net.float() and give a float32 example"
            )
