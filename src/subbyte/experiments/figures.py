"""The figures that runs measure, with their titles in tables.

top1, loss, bytes and bits are of the whole file, read back. spikes: epochs whose training loss is
far above that of the epoch before (`work.SPIKE`). changed: share of the weights that are on another
level than an epoch ago.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What a run measures. title: in tables, with the unit; form: of the numbers."""

    title: str
    form: str


FIGURES = {
    "top1": Figure("top-1 %", ".2f"),
    "top1_float": Figure("top-1 % of float", ".2f"),
    "lost": Figure("points below float", ".2f"),
    "top1_cora": Figure("top-1 % of CoRa", ".2f"),
    "gain": Figure("points of CoRa above block reconstruction", ".2f"),
    "seconds_cora": Figure("seconds of CoRa", ",.0f"),
    "cost_ratio": Figure("time of block reconstruction over that of CoRa", ".1f"),
    "top1_before_rounding": Figure("top-1 % before rounding", ".2f"),
    "lost_by_rounding": Figure("points lost by rounding", ".2f"),
    "score": Figure("score", ".4f"),
    "bytes": Figure("bytes of the file", ",.0f"),
    "bits": Figure("bits per weight of the file", ".3f"),
    "layer_bits": Figure("bits per quantized weight", ".3f"),
    "parameters": Figure("parameters", ",.0f"),
    "distance": Figure("steps to the levels", ".5f"),
    "changed": Figure("mean share that changes level in an epoch", ".4f"),
    "changed_first": Figure("share that changes level in the first epoch", ".4f"),
    "changed_last": Figure("share that changes level in the last epoch", ".4f"),
    "spikes": Figure("loss spikes", ".0f"),
    "reduction": Figure("quantized layers smaller by", ".1f"),
    "seconds": Figure("seconds", ",.0f"),
    "iterations": Figure("iterations", ",.0f"),
    "rank_spread": Figure("largest rank less smallest", ".0f"),
}
