"""Write the corpus of tests/native/fuzz.cpp: tiny packed files of every kind of layer.

python tests/native/corpus.py
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import subbyte as sb
from subbyte import LowRes
from test_artifact import edit

CORPUS = Path(__file__).parent / "corpus"


class Images(nn.Module):
    """Convolutions, norms, pools, resizing, concatenation."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 2, 2, stride=2)
        self.edge = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.norm(self.a(x))), 2)
        y = F.hardswish(self.deep(y)) + F.silu(y) * F.hardsigmoid(y)
        y = torch.cat([self.up(y), x], 1)[:, 1:3]
        y = F.interpolate(self.edge(y), scale_factor=2, mode="bilinear")
        y = F.avg_pool2d(F.interpolate(F.pad(y, (1, 0, 0, 1)), size=(4, 4)), 2)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)), y.mean((2, 3))


class Words(nn.Module):
    """Embeddings, attention, norms, masks, indices."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.one, self.head = nn.Conv1d(8, 8, 3, padding="same"), nn.Linear(8, 9)
        self.register_buffer("mask", torch.ones(4, 4).triu(1).bool())

    def forward(self, tokens):
        x = self.table(tokens)
        y, weights = self.attend(x, x, x, attn_mask=self.mask)
        z = self.group(self.one(self.norm(x + y).transpose(1, 2))).transpose(1, 2)
        q = z.reshape(z.shape[0], 4, 2, 4).permute(0, 2, 1, 3)
        z = (
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            .transpose(1, 2)
            .contiguous()
            .flatten(2)
        )
        z = torch.where(z > 0, z, z.exp().masked_fill(z < -1, 0.0))
        first, second = z.chunk(2, -1)
        z = torch.cat([first * second, z.softmax(-1)], -1)[..., :8]
        return F.gelu(self.head(z)), weights.amax(-1)


class Chain(nn.Module):
    """Everything that may stay in 8 bits."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pair = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.head, self.flat = nn.Linear(16, 3), nn.Linear(16 * 4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        y = self.b(F.relu6(self.deep(x))) + x
        y = F.hardswish(self.pair(torch.cat([y, x], 1)))
        y = F.avg_pool2d(F.pad(y[:, :, ::2], (0, 0, 0, 1)), 1)
        return self.head(y.mean((2, 3))), self.flat(y.flatten(1))


def write(name, net, example, method, static=False):
    torch.manual_seed(0)
    sb.prepare(net, method)
    path = CORPUS / f"{name}.safetensors"
    net, scales = sb.pack(sb.freeze(net)), None
    if static:
        net = sb.fuse(net)
        scales = sb.calibrate_activations(net, [example])
    sb.save(net, path, example=example, activations=scales)
    edit(path, lambda manifest: None)  # without checksums


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    images, words = torch.randn(2, 2, 4, 4), torch.randint(0, 9, (2, 4))
    write("images", Images(), images, LowRes(levels=3))
    write("words", Words(), words, LowRes(levels=5, granularity="channel"))
    write("chain", Chain(), images, LowRes(levels=3), static=True)
    groups = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    write("groups", groups, torch.randn(2, 8), LowRes(levels=4))
