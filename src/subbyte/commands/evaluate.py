"""`subbyte evaluate`: a file, a network or a folder and data in; its score out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from subbyte.commands import options as o
from subbyte.commands.networks import float_network, packed_network
from subbyte.commands.output import print_json
from subbyte.commands.pretrained import NO_FOLDER, WINDOW, check_plain_folder, evaluate_folder
from subbyte.data import ImageSet, load_images
from subbyte.errors import SubbyteError
from subbyte.models import NETWORKS
from subbyte.storage.pretrained import is_folder
from subbyte.train import evaluate as score


def evaluate(
    target: o.Target,
    data: o.Data,
    weights: o.Weights = None,
    model: o.Model = None,
    split: o.Split = "test",
    size: o.Size = None,
    limit: o.Limit = None,
    task: o.Task = None,
    window: o.Window = WINDOW,
    precision: o.Precision = "auto",
    json_: o.Json = False,
) -> None:
    """The score of a network: top-1 on images, or perplexity of a language model on a text."""
    if is_folder(target):
        check_plain_folder({"--weights": weights, "--size": size, "--model": model})
        found = evaluate_folder(
            Path(target), Path(data), task or "", window=window, limit=limit, precision=precision
        )
        if json_:
            print_json({"target": target, "data": data, **asdict(found)})
            return
        print(f"{target} on {data}: {found.measure} {found.value:.3f} of {found.n:,} tokens")
        return
    if task is not None:
        raise SubbyteError(NO_FOLDER.format(target))
    if target not in NETWORKS and not Path(target).exists():
        raise SubbyteError(
            f"'{target}' is neither a file nor a zoo network; networks: {', '.join(NETWORKS)}"
        )
    images = load_images(data, split, size=size)
    images = images if limit is None else images.head(limit)
    result = score(_network(target, model, weights, images, precision), images)
    if json_:
        print_json({"target": target, "data": data, "split": images.split, **asdict(result)})
        return
    print(
        f"{target} on {data} ({images.split}): top-1 {result.top1:.2f} % of {result.n:,} images, "
        f"loss {result.loss:.4f}"
    )


def _network(
    target: str, model: str | None, weights: Path | None, images: ImageSet, precision: Any
) -> nn.Module:
    """A packed file, or a zoo network (a name wins over a file) that fits the images."""
    if target not in NETWORKS:
        if weights is not None:
            raise SubbyteError(f"{target} is a file; --weights goes with the name of a network")
        return packed_network(target, model, precision)
    if model is not None:
        raise SubbyteError(f"--model goes with a packed file; {target} is a zoo network")
    return float_network(target, weights, images)
