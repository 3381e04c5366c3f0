"""LowRes beyond images: a small language model and a forecast, from scratch, several seeds.

    subbyte experiment run open/text
    subbyte experiment run open/series

text: a transformer of three blocks over bytes, on the help texts that ship with Python (the module
pydoc_data.topics); perplexity per byte on its last tenth. series: a GRU over the membrane potential
that ships with matplotlib (membrane.dat, 12,000 samples), which forecasts 8 samples ahead; R^2 on
the last quarter, beside the forecast that nothing changes. Levels go into every layer, tables and
heads included. --variation is "float" or, say, "5-levels"; `result.json` in the folder of --out has
the figures.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import leave, run_options
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte as sb

WINDOW, AHEAD = 96, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    options = run_options(parser)
    word = options.variation.removesuffix("-levels")
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    found = CASES[options.case]("float" if word == "float" else int(word))
    figures = {key: found.pop(key) for key in ("score", "bytes")}
    leave(options, figures, time.perf_counter() - started, found)


def trained(
    net: nn.Module, levels: Any, loss_of: Callable[[], Tensor], steps: int, lr: float
) -> nn.Module:
    """The network after so many steps of AdamW, packed if it has levels."""
    if levels != "float":
        sb.prepare(net, sb.LowRes(levels=levels))
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        sb.after_step(net, step / steps)
        schedule.step()
    net.eval()
    return net if levels == "float" else sb.pack(sb.freeze(net), precision="float32")


def n_bytes(net: nn.Module, levels: Any) -> int:
    """Of the whole network: the packed file, or float32 parameters."""
    if levels == "float":
        return sum(p.numel() * 4 for p in net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        return sb.save(net, Path(folder) / "net.safetensors")


# ---------------------------------------------------------------- text


class Bytes(nn.Module):
    """A causal transformer over bytes: [n, tokens] -> [n, tokens, 256]."""

    def __init__(self, width: int = 96, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(256, width), nn.Embedding(WINDOW, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n)
        x = self.table(ids) + self.places(torch.arange(n))
        return self.head(self.norm(self.blocks(x, mask=mask)))


def text(levels: Any) -> dict[str, Any]:
    from pydoc_data import topics

    raw = "".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    net, steps, lr = Bytes(), 1200, 2e-3

    def loss_of() -> Tensor:
        starts = torch.randint(0, cut - WINDOW - 1, (32,))
        batch = torch.stack([data[s : s + WINDOW + 1] for s in starts])
        return F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    net_run = trained(net, levels, loss_of, steps, lr)
    rows = data[cut:]
    rows = rows[: len(rows) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
    with torch.no_grad():
        losses = [
            F.cross_entropy(net_run(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="none")
            for x in rows.split(64)
        ]
    return {
        "measure": "perplexity per byte", "score": math.exp(torch.cat(losses).double().mean()),
        "steps": steps, "bytes": n_bytes(net_run, levels), "data_bytes": len(raw),
    }  # fmt: skip


# ---------------------------------------------------------------- series


class Forecast(nn.Module):
    """Samples [n, time] -> the change from the last one to the one AHEAD of it [n]."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn((x - x[:, -1:])[:, :, None])[0][:, -1])[:, 0]


def series(levels: Any) -> dict[str, Any]:
    from matplotlib import cbook

    with cbook.get_sample_data("membrane.dat") as file:
        values = torch.from_numpy(np.frombuffer(file.read(), np.float32).copy())
    values = (values - values.mean()) / values.std()
    windows = values.unfold(0, WINDOW + AHEAD, 1)
    x, change = windows[:, :WINDOW], windows[:, -1] - windows[:, WINDOW - 1]
    cut = len(x) * 3 // 4
    net, steps, lr = Forecast(), 800, 4e-3

    def loss_of() -> Tensor:
        own = torch.randint(0, cut - WINDOW - AHEAD, (64,))
        return F.mse_loss(net(x[own]), change[own])

    net_run = trained(net, levels, loss_of, steps, lr)
    with torch.no_grad():
        guess = torch.cat([net_run(part) for part in x[cut:].split(256)])
    wanted = windows[cut:, -1]
    spread = (wanted - wanted.mean()).square().mean()

    def r2(error: Tensor) -> float:
        return 1 - float(error.square().mean() / spread)

    return {
        "measure": "R^2", "score": r2(guess - change[cut:]), "no_change": r2(change[cut:]),
        "steps": steps, "bytes": n_bytes(net_run, levels),
    }  # fmt: skip


CASES = {"text": text, "series": series}

if __name__ == "__main__":
    main()
