"""Small networks of every supported kind, for tests."""

import torch
from torch import nn


class Mixed(nn.Module):
    """Conv, transposed conv, norm, embedding, attention and linear in one forward pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2)
        self.table = nn.Embedding(11, 16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x, tokens):
        y = self.up(self.norm(self.conv(x)).relu()).mean(dim=(1, 2, 3))
        e = self.table(tokens)
        e, _ = self.attn(e, e, e, need_weights=False)
        return self.head(e.mean(1)) + y[:, None]


def mixed_input(seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 9, 9, generator=generator)
    return x, torch.randint(0, 11, (n, 7), generator=generator)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.free = nn.Linear(4, 4)

    def forward(self, tokens):
        return self.head(self.free(self.table(tokens)))
