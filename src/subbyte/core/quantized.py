"""What finding a quantization ends in, on either road: the float network and what became of it.

done = sb.freeze(model)                                            # after training
done = sb.quantize(model, sb.CoRa(bits=3), calibration=batches)    # without
net = sb.pack(done)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from subbyte.core.account import ParameterAccount, accounts
from subbyte.core.plan import Plan
from subbyte.core.tensors import QuantizedLayer


@dataclass(frozen=True, slots=True)
class Evidence:
    """What post-training quantization measured.

    plan: what each layer got. seconds: of the work, once the batches were read. iterations: tuning
    steps taken. task: what the network was judged by. distance: the task's, mean over the held-out
    calibration examples, of the packed network from the float one. agreement: percent of their
    items (images, tokens, pixels) of which it makes the same decision; None where none is made.
    """

    plan: Plan
    seconds: float
    iterations: int
    task: str
    distance: float
    agreement: float | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Quantized:
    """A float network and what its layers became. Nothing writes to it once it is made.

    model: the float network; its norms and biases may have been moved. layers: by layer name, as
    the plan names them. notes: decisions worth a line each. evidence: of post-training alone.
    """

    model: nn.Module
    layers: Mapping[str, QuantizedLayer]
    notes: tuple[str, ...] = ()
    evidence: Evidence | None = None

    def __repr__(self) -> str:
        return f"Quantized({type(self.model).__name__}, {len(self.layers)} quantized layers)"

    @property
    def plan(self) -> Plan | None:
        """What each layer got; None on the road of training, where `prepare` returns the plan."""
        return None if self.evidence is None else self.evidence.plan

    @property
    def agreement(self) -> float | None:
        """See `Evidence`; None where nothing was held out, on the road of training."""
        return None if self.evidence is None else self.evidence.agreement

    @property
    def parameters(self) -> tuple[ParameterAccount, ...]:
        """Every parameter of the network, each once: quantized, or float with the reason."""
        return accounts(self.model, self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole network: every parameter, float ones at the width that they have."""
        found = self.parameters
        return 8 * sum(p.n_bytes for p in found) / max(1, sum(p.n_values for p in found))

    @property
    def layer_bits_per_weight(self) -> float:
        """Of the quantized layers alone: codes, scales and adapters over their weights."""
        n_weights = sum(layer.weight.shape.numel() for layer in self.layers.values())
        return 8 * sum(layer.n_bytes for layer in self.layers.values()) / max(1, n_weights)
