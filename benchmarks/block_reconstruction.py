"""What a search by gradient descent costs: AdaRound in blocks (BRECQ's way) against `sb.CoRa`.

    subbyte experiment run cora/block-reconstruction

ResNet-20 on CIFAR-10, 8 levels a weight, the same 1600 images for both. Each residual block (and
the first and the last layer) is reconstructed in order: its input from the network quantized so
far, its target the float network's output; the rounding of every weight learns by AdaRound's soft
rounding (Nagel et al., arXiv:2004.10568; in blocks: Li et al., arXiv:2102.05426), Adam, lr 1e-3,
batch 32. BRECQ takes 20 000 iterations a block. With fewer, the line also has the time for 20 000,
multiplied out from the measured time of a step and called so; the accuracy is of what was run.
--cost-only scores nothing: it times steps (on a few images: a step does not depend on how many
there are), then CoRa, then steps again, for the ratio.
Written for this comparison only.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import leave, run_options
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subbyte.commands.quantize import drawn
from subbyte.core.grids import PerChannel, uniform
from subbyte.core.rtn import rtn
from subbyte.core.tensors import as_matrix
from subbyte.data import load_images
from subbyte.models import build, load_weights
from subbyte.modules import pack
from subbyte.ptq import CoRa, quantize
from subbyte.train import evaluate

SHARED = Path("../shared/data")
PUBLISHED_ITERATIONS, BATCH, LR = 20_000, 32, 1e-3
STRETCH, SHRINK = 1.1, -0.1  # of the rectified sigmoid
FEW = 160  # images that time a step
WARM_UP, FIRST_BETA, LAST_BETA, WEIGHT = 0.2, 20.0, 2.0, 0.01


class SoftRounding(nn.Module):
    """A weight on the lower or the upper of its two nearest levels, softly while it learns."""

    def __init__(self, w: Tensor, levels: int) -> None:
        super().__init__()
        scale = rtn(as_matrix(w), None, uniform(levels, PerChannel(0))).scale
        self.step = (2 * scale / (levels - 1)).reshape([-1] + [1] * (w.ndim - 1))
        self.half = (levels - 1) / 2
        position = w / self.step + self.half  # 0 .. levels - 1
        self.floor, self.top = position.floor(), levels - 1
        rest = (position - self.floor).clamp(0.01, 0.99)
        start = (rest - SHRINK) / (STRETCH - SHRINK)
        self.v = nn.Parameter((start / (1 - start)).log())
        self.hard = False

    def soft(self) -> Tensor:
        return (self.v.sigmoid() * (STRETCH - SHRINK) + SHRINK).clamp(0, 1)

    def forward(self, _: Tensor) -> Tensor:
        up = (self.v > 0).float() if self.hard else self.soft()
        return ((self.floor + up).clamp(0, self.top) - self.half) * self.step


def blocks(net: nn.Module) -> list[str]:
    inner = [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    assert all(net.get_submodule(name) is not None for name in inner)
    return ["conv1", *inner, "linear"]


@torch.no_grad()
def captured(net: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of a block on all images."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = net.get_submodule(name).register_forward_hook(
        lambda _, args, y: seen.append((args[0].clone(), y.clone()))
    )
    for x in images.split(100):
        net(x)
    handle.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


def reconstruct(
    block: nn.Module, x: Tensor, target: Tensor, levels: int, iterations: int
) -> Iterator[float]:
    """Learn the rounding of a block's weights in place; yields the seconds of each step."""
    layers = [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    roundings = []
    for layer in layers:
        rounding = SoftRounding(layer.weight.detach().clone(), levels)
        parametrize.register_parametrization(layer, "weight", rounding)
        roundings.append(rounding)
    optimizer = torch.optim.Adam([r.v for r in roundings], lr=LR)
    for i in range(iterations):
        started = time.perf_counter()
        index = torch.randint(len(x), (BATCH,))
        loss = (block(x[index]) - target[index]).square().sum(1).mean()
        done = (i / iterations - WARM_UP) / (1 - WARM_UP)
        if done > 0:
            beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - done)
            gap = sum((1 - (2 * r.soft() - 1).abs().pow(beta)).sum() for r in roundings)
            loss = loss + WEIGHT * gap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield time.perf_counter() - started
    for rounding in roundings:
        rounding.hard = True


def reconstructed(
    net: nn.Module, x: Tensor, levels: int, iterations: int
) -> tuple[nn.Module, float, float]:
    """The network with all blocks reconstructed; seconds of all, and of one step of every block."""
    student, seconds, a_step = copy.deepcopy(net), 0.0, 0.0
    for name in blocks(net):
        started = time.perf_counter()
        inputs, target = captured(student, name, x)[0], captured(net, name, x)[1]
        block = student.get_submodule(name)
        steps = list(reconstruct(block, inputs, target, levels, iterations))
        seconds += time.perf_counter() - started
        a_step += sum(steps) / len(steps)
        print(f"{name}: {1000 * sum(steps) / len(steps):.1f} ms a step", flush=True)
    return student, seconds, a_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1600)
    parser.add_argument("--tune", type=int, default=0, help="iterations of CoRa's tuning")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cost-only", action="store_true", help="times alone, no accuracy")
    options = run_options(parser)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = build("resnet20")
    load_weights(net, SHARED / "weights" / "resnet20_cifar10.safetensors")
    net.eval()
    images = drawn(load_images(str(SHARED / "cifar10"), "train"), options.samples, options.seed)
    x = net.preprocess(images.images[:])
    own = x[:FEW] if options.cost_only else x
    student, seconds, steps = reconstructed(net, own, options.levels, options.iterations)
    ours = quantize(
        net, CoRa(levels=options.levels, tune=options.tune), calibration=[x], seed=options.seed
    )
    whole = [PUBLISHED_ITERATIONS * steps]
    figures = {"seconds": seconds, "seconds_cora": ours.evidence.seconds,
               "cora_bits": ours.layer_bits_per_weight}  # fmt: skip
    if options.cost_only:
        again = reconstructed(net, own, options.levels, options.iterations)[2]
        whole.append(PUBLISHED_ITERATIONS * again)
        figures["cost_ratio"] = sum(whole) / 2 / ours.evidence.seconds
    else:
        test = load_images(str(SHARED / "cifar10"), "test")
        top1 = evaluate(student, test).top1
        top1_cora = evaluate(pack(ours), test, preprocess=net.preprocess).top1
        figures |= {"top1": top1, "top1_cora": top1_cora, "gain": top1_cora - top1,
                    "cost_ratio": seconds / ours.evidence.seconds}  # fmt: skip
    leave(options, figures, seconds, {
        "iterations": options.iterations, "levels": options.levels, "samples": options.samples,
        "seconds_of_20000_multiplied_out": whole, "cora_tune": options.tune,
    })  # fmt: skip


if __name__ == "__main__":
    main()
