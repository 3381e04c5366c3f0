"""Time of a quantized training step over that of the same step in float32.

    .venv/bin/python benchmarks/train_step.py
    .venv/bin/python benchmarks/train_step.py --network resnet20 --method sgm

Both are `subbyte.train`'s own update (channels_last, each weight quantized once, the method's
hooks), eager, on the same random 3x32x32 images. The two are measured in one process in turn, each
round in the opposite order of the one before, so that a change of the machine's speed meets both;
the overhead is the median of the rounds' ratios. On a busy machine go by the ratio of CPU times.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
from common import append, spread
from torch import Tensor

from subbyte import LSQ, SGM, TWN, LowRes, prepare
from subbyte.methods import Method
from subbyte.models import build
from subbyte.train.settings import LoopConfig
from subbyte.train.update import State, start, update

CLASSES, WARM_UP_ROUNDS = 10, 2
METHODS: dict[str, Method] = {
    "lowres": LowRes(levels=5),
    "sgm": SGM(bits=2),
    "twn": TWN(),
    "lsq": LSQ(bits=2),
}


@dataclass(frozen=True)
class Batch:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n]."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Step:
    """Milliseconds of one step: by the clock, and of the processor over all threads."""

    wall: float
    cpu: float


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = LoopConfig(epochs=1, lr=0.01, batch_size=options.batch)
    batch = random_batch(options.batch)
    plain = training(options.network, None, config)
    quantized = training(options.network, METHODS[options.method], config)
    for _ in range(WARM_UP_ROUNDS):
        one_round(plain, quantized, batch, config, True)
    rounds = [one_round(plain, quantized, batch, config, i % 2 == 0) for i in range(options.rounds)]
    report(options, rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cvnn2")
    parser.add_argument("--method", choices=list(METHODS), default="lowres")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch (as it chooses)")
    return parser.parse_args()


def random_batch(n: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(x, torch.randint(0, CLASSES, (n,), generator=generator))


def training(network: str, method: Method | None, config: LoopConfig) -> State:
    """A network of the same first weights each time, ready for its first step."""
    torch.manual_seed(0)
    model = build(network, classes=CLASSES)
    if method is not None:
        prepare(model, method)
    return start(model.train(), config)


def one_round(
    plain: State, quantized: State, batch: Batch, config: LoopConfig, plain_first: bool
) -> tuple[Step, Step]:
    """A float step and a quantized step."""
    if plain_first:
        first = timed(plain, batch, config)
        return first, timed(quantized, batch, config)
    first = timed(quantized, batch, config)
    return timed(plain, batch, config), first


def timed(state: State, batch: Batch, config: LoopConfig) -> Step:
    wall, cpu = time.perf_counter(), time.process_time()
    loss, _ = update(state, batch.x, batch.y, config, 0.5)
    step = Step(1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu))
    if not math.isfinite(loss):
        raise SystemExit(f"the loss became {loss}: these steps are not those of a training")
    return step


def report(options: argparse.Namespace, rounds: list[tuple[Step, Step]]) -> None:
    plain = spread([a.wall for a, _ in rounds])
    quantized = spread([b.wall for _, b in rounds])
    ratio = spread([b.wall / a.wall for a, b in rounds])
    cpu_ratio = spread([b.cpu / a.cpu for a, b in rounds])
    figures = {"float_ms": plain, "quantized_ms": quantized, "ratio": ratio, "cpu_ratio": cpu_ratio}
    settings = {key: value for key, value in vars(options).items() if key != "threads"}
    path = append("train_step", {**settings, **figures})
    print(
        f"{options.network}, batch {options.batch}, {METHODS[options.method]}, "
        f"{torch.get_num_threads()} threads: float {plain.median:.1f} ms, quantized "
        f"{quantized.median:.1f} ms, ratio {ratio}, of CPU time {cpu_ratio}; added to {path.name}"
    )


if __name__ == "__main__":
    main()
