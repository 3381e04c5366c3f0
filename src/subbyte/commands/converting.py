"""Post-training as the work of an experiment: `subbyte quantize` with its settings in a table.

[quantize]                      # the fields of QuantizeSettings
model = "resnet20"
weights = "weights.safetensors"
calibrate = "cifar10"

[method]                        # name = "cora" or "published", and its options
name = "cora"
target_bits = 4.25
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from subbyte import storage
from subbyte.commands.networks import float_network
from subbyte.commands.quantize import SAMPLES, Conversion, Request, convert
from subbyte.core.toml import Place, check_keys, nearest, read_fields
from subbyte.data import ImageSet, batches, load_images
from subbyte.errors import SubbyteError
from subbyte.experiments.work import Found, Job, Ready
from subbyte.ptq import CoRa, PublishedCoRa
from subbyte.ptq.published import equivalent_bits
from subbyte.report import size_report
from subbyte.train import console_progress
from subbyte.train.evaluate import preprocess_of

METHODS: dict[str, type[CoRa] | type[PublishedCoRa]] = {"cora": CoRa, "published": PublishedCoRa}
_BATCH = 64


@dataclass(frozen=True)
class QuantizeSettings:
    """As the options of `subbyte quantize`. score: the split that is scored."""

    model: str
    weights: str
    calibrate: str
    score: str = "test"
    samples: int = SAMPLES


def converted(job: Job) -> Ready:
    """Quantizes, saves, reads back and scores; on which images the two networks differ."""
    place = Place(job.place)
    check_keys(job.settings, ("quantize", "method"), place)
    settings = read_fields(QuantizeSettings, job.settings["quantize"], Place(job.place, "quantize"))
    method = _method(job.settings.get("method", {}), Place(job.place, "method"))
    request = Request(
        settings.model, settings.calibrate, job.out / "net.safetensors", Path(settings.weights),
        settings.samples, job.seed, score=settings.score,
    )  # fmt: skip

    def work(quiet: bool) -> Found:
        # This process is alone, so there is a result.
        done = cast(Conversion, convert(request, method, console_progress(quiet=quiet)))
        return _found(done, method, _paired(request))

    return work


def _method(table: dict[str, Any], place: Place) -> CoRa | PublishedCoRa:
    name = table.get("name")
    if name not in METHODS:
        hint = nearest(str(name), list(METHODS))
        raise SubbyteError(f"{place.key('name')} = {name!r}: no such method; {hint}")
    options = {key: value for key, value in table.items() if key != "name"}
    return read_fields(METHODS[name], options, place, ("name",))


def _found(done: Conversion, method: CoRa | PublishedCoRa, differing: dict[str, object]) -> Found:
    shown = done.to_dict()
    plan = done.evidence.plan
    ranks = [layer.rank for layer in plan.layers]
    figures = {
        **{key: shown[key] for key in ("top1", "top1_float", "bytes", "seconds", "iterations")},
        "lost": (shown["top1_float"] or 0.0) - (shown["top1"] or 0.0),
        "bits": size_report(done.file).to_dict()["whole"]["file_bits_per_weight"],
        "layer_bits": shown["layer_bits_per_weight"],
        "agreement": shown["agreement"],
        "rank_spread": max(ranks) - min(ranks),
    }
    details = {
        "notes": shown["notes"], "levels": [layer.levels for layer in plan.layers], "ranks": ranks,
        "options": str(method), **differing,
    }  # fmt: skip
    if isinstance(method, PublishedCoRa):
        details["equivalent_bits"] = equivalent_bits(plan, method)
    return Found(figures, done.evidence.seconds, details=details)


def _paired(request: Request) -> dict[str, object]:
    """Of the images that are scored: how many the packed network loses, how many it gains, and the
    95 % interval of the net loss in percent (normal, from the pairs that differ)."""
    images = load_images(request.calibrate, request.score or "")
    before = _right(float_network(request.model, request.weights, images), images)
    after = _right(storage.load(request.out, precision="float32"), images)
    n, lost, won = len(images), int((before & ~after).sum()), int((after & ~before).sum())
    net, wide = lost - won, 1.96 * math.sqrt(max(0, lost + won - (lost - won) ** 2 / n))
    return {
        "images": n, "right_to_wrong": lost, "wrong_to_right": won,
        "net_loss_percent": [100 * x / n for x in (net, net - wide, net + wide)],
    }  # fmt: skip


@torch.inference_mode()
def _right(net: nn.Module, images: ImageSet) -> Tensor:
    """Whether the network names each image's class."""
    preprocess = preprocess_of(net)
    parts = [net(preprocess(x)).argmax(1) == y for x, y in batches(images, _BATCH)]
    return torch.cat(parts)
