"""What `subbyte quantize` says of any network that it has converted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from subbyte.core.atomic import check_writable
from subbyte.core.quantized import Evidence, Quantized


def check_places(*paths: Path | None) -> None:
    """Raises SubbyteError for a place that cannot be written, before the work."""
    for path in paths:
        if path is not None:
            check_writable(path)


def evidence_of(done: Quantized) -> Evidence:
    """Its evidence, which `quantize` always leaves."""
    assert done.evidence is not None
    return done.evidence


def figures(done: Quantized) -> dict[str, Any]:
    """Bits, seconds and how far the network is from the float one, for JSON."""
    evidence = evidence_of(done)
    return {
        "bits_per_weight": done.bits_per_weight,
        "layer_bits_per_weight": done.layer_bits_per_weight,
        "seconds": evidence.seconds,
        "iterations": evidence.iterations,
        "task": evidence.task,
        "distance": evidence.distance,
        "agreement": evidence.agreement,
    }


def details(done: Quantized) -> dict[str, Any]:
    """Notes, layers and parameters, for JSON."""
    return {
        "notes": list(done.notes),
        "layers": evidence_of(done).plan.to_dict()["layers"],
        "parameters": [asdict(parameter) for parameter in done.parameters],
    }
