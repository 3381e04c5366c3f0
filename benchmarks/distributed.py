"""Time of a training step of two processes over that of one, at the same batch of all together.

    torchrun --nproc-per-node 2 benchmarks/distributed.py
    torchrun --nproc-per-node 2 benchmarks/distributed.py --network vgg7 --strategy fsdp

Every process has one thread. A round has three parts, one after the other: the leading process
trains alone on whole batches while the others sleep; all train together; and each trains alone on
its part of the batch, which is the same arithmetic without any exchange. The ratio is the median of
the rounds' ratios; on a busy machine go by that of CPU times. data: drawing and augmenting, from
the images; exchange: what is left of a step of all together without data and arithmetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import append, spread
from torch import Tensor

from subbyte import SGM, LowRes, prepare
from subbyte.core.group import ALONE, Group, joined
from subbyte.data import ImageSet
from subbyte.models import build
from subbyte.train import DataConfig, LoopConfig, ModelConfig, RunConfig
from subbyte.train.loop import _draw
from subbyte.train.update import State, start, update

CLASSES, WARM_UP_STEPS = 10, 2
METHODS = {"lowres": LowRes(levels=5), "sgm": SGM(bits=2)}


@dataclass(frozen=True)
class Step:
    """Milliseconds, means over some steps: by the clock, of that for the images; and of the CPU."""

    wall: float
    data: float
    cpu: float


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with joined() as group:
        whole = training(options, ALONE, ALONE)
        together = training(options, group, group)
        part = training(options, ALONE, group)
        for run in (whole, together, part):
            run.steps(WARM_UP_STEPS)
        rounds = [
            one_round(options.steps, group, whole, together, part) for _ in range(options.rounds)
        ]
    if group.leads:
        report(options, group.size, rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cvnn2")
    parser.add_argument("--method", choices=list(METHODS), default="lowres")
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--batch", type=int, default=128, help="images a step, of all processes")
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


@dataclass
class Training:
    """A network in training on its own stream of batches."""

    state: State
    config: RunConfig
    drawn: Iterator[tuple[Tensor, Tensor, int]]
    n: int | None = None

    def steps(self, count: int) -> Step:
        started, data, cpu = time.perf_counter(), 0.0, time.process_time()
        for _ in range(count):
            before = time.perf_counter()
            x, y, n = next(self.drawn)
            data += time.perf_counter() - before
            update(self.state, x, y, self.config.train, 0.5, self.n or n)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Step(1000 * wall / count, 1000 * data / count, 1000 * cpu / count)


def training(options: argparse.Namespace, group: Group, parts: Group) -> Training:
    """group: who trains together. parts: whose share of each batch this process takes."""
    loop = LoopConfig(epochs=1, lr=0.01, batch_size=options.batch, strategy=options.strategy)
    data = DataConfig("made-up", crop=4, flip=True)
    config = RunConfig(ModelConfig(options.network), data, loop, None, Path("nowhere"))
    torch.manual_seed(0)
    model = build(options.network, classes=CLASSES)
    prepare(model, METHODS[options.method])
    images = made_up(options.batch * (WARM_UP_STEPS + options.rounds * options.steps))
    drawn = _draw(images, config, 0, 10**9, parts)
    alone_on_a_part = group.alone and not parts.alone
    n = options.batch // parts.size if alone_on_a_part else None
    return Training(start(model.train(), loop, group=group), config, drawn, n)


def made_up(n: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    return ImageSet(x, y, tuple(map(str, range(CLASSES))), "made-up", "train")


def one_round(
    steps: int, group: Group, whole: Training, together: Training, part: Training
) -> tuple[Step, Step, Step]:
    alone = group.told(lambda: whole.steps(steps))
    group.sum(0)  # all begin at one time
    joint = together.steps(steps)
    group.sum(0)
    return alone, joint, part.steps(steps)


def report(options: argparse.Namespace, size: int, rounds: list[tuple[Step, Step, Step]]) -> None:
    figures = {
        "alone_ms": spread([a.wall for a, _, _ in rounds]),
        "together_ms": spread([b.wall for _, b, _ in rounds]),
        "ratio": spread([b.wall / a.wall for a, b, _ in rounds]),
        "cpu_ratio": spread([b.cpu / a.cpu for a, b, _ in rounds]),
        "data_ms": spread([b.data for _, b, _ in rounds]),
        "arithmetic_ms": spread([c.wall - c.data for _, _, c in rounds]),
        "exchange_ms": spread([b.wall - b.data - (c.wall - c.data) for _, b, c in rounds]),
    }
    path = append("distributed", {**vars(options), "processes": size, **figures})
    print(
        f"{options.network}, batch {options.batch}, {options.method}, {options.strategy}: one "
        f"process {figures['alone_ms'].median:.1f} ms, {size} processes "
        f"{figures['together_ms'].median:.1f} ms, ratio {figures['ratio']}, of CPU time "
        f"{figures['cpu_ratio']}; added to {path.name}"
    )


if __name__ == "__main__":
    main()
