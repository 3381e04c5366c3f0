"""Time of a LowRes training step over that of the same step in float32.

Both are `subbyte.train`'s own update (channels_last, each weight quantized once, the method's
hooks), eager, on the same random 3x32x32 images. The two are measured in one process in turn, each
round in the opposite order of the one before, so that a change of the machine's speed meets both;
the overhead is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from common import append, spread
from torch import Tensor

from subbyte import LowRes, prepare
from subbyte.models import build
from subbyte.train.settings import LoopConfig
from subbyte.train.update import State, start, update

CLASSES, WARM_UP_ROUNDS = 10, 2


@dataclass(frozen=True)
class Batch:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n]."""

    x: Tensor
    y: Tensor


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = LoopConfig(epochs=1, lr=0.01, batch_size=options.batch)
    batch = random_batch(options.batch)
    plain = training(options.network, None, config)
    lowres = training(options.network, LowRes(levels=options.levels), config)
    for _ in range(WARM_UP_ROUNDS):
        one_round(plain, lowres, batch, config, True)
    rounds = [one_round(plain, lowres, batch, config, i % 2 == 0) for i in range(options.rounds)]
    report(options, rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cvnn2")
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch (as it chooses)")
    return parser.parse_args()


def random_batch(n: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(x, torch.randint(0, CLASSES, (n,), generator=generator))


def training(network: str, method: LowRes | None, config: LoopConfig) -> State:
    """A network of the same first weights each time, ready for its first step."""
    torch.manual_seed(0)
    model = build(network, classes=CLASSES)
    if method is not None:
        prepare(model, method)
    return start(model.train(), config)


def one_round(
    plain: State, lowres: State, batch: Batch, config: LoopConfig, plain_first: bool
) -> tuple[float, float]:
    """Milliseconds of a float step and of a LowRes step."""
    if plain_first:
        first = step_ms(plain, batch, config)
        return first, step_ms(lowres, batch, config)
    first = step_ms(lowres, batch, config)
    return step_ms(plain, batch, config), first


def step_ms(state: State, batch: Batch, config: LoopConfig) -> float:
    started = time.perf_counter()
    loss, _ = update(state, batch.x, batch.y, config, 0.5)
    elapsed = 1000 * (time.perf_counter() - started)
    if not torch.tensor(loss).isfinite():
        raise SystemExit(f"the loss became {loss}: these steps are not those of a training")
    return elapsed


def report(options: argparse.Namespace, rounds: list[tuple[float, float]]) -> None:
    plain, lowres = (spread(times) for times in zip(*rounds, strict=True))
    ratio = spread([slow / fast for fast, slow in rounds])
    settings = {key: value for key, value in vars(options).items() if key != "threads"}
    path = append(
        "train_step", {**settings, "float_ms": plain, "lowres_ms": lowres, "ratio": ratio}
    )
    print(
        f"{options.network}, batch {options.batch}, LowRes(levels={options.levels}), "
        f"{torch.get_num_threads()} threads: float {plain.median:.1f} ms, "
        f"LowRes {lowres.median:.1f} ms, ratio {ratio}; added to {path.name}"
    )


if __name__ == "__main__":
    main()
