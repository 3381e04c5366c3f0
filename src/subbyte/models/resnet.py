"""ResNet-20/32/44/56 for CIFAR, with shortcuts that have no parameters (option A).

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2. Where the
shape changes, the shortcut takes every second pixel and pads zero channels, half on either side.
The state-dict keys are those of the widely used checkpoints (`layer1.0.conv1.weight`, `linear`).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.models.base import Network, checked_spec, glorot_
from subbyte.models.preprocess import Preprocess

PREPROCESS = Preprocess(None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, channels, h / stride, w / stride] of x [n, in_channels, h, w]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.new_channels == 0:
            return x
        before = self.new_channels // 2
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(Network):
    """A convolution, three stages of `blocks` blocks (16, 32, 64 channels), mean, linear."""

    def __init__(self, name: str, blocks: int, classes: int) -> None:
        super().__init__(checked_spec(name, classes=classes), PREPROCESS, classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, h, w] of any size."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20(*, classes: int = 10) -> CifarResNet:
    """3 blocks a stage: 0.27 million parameters."""
    return CifarResNet("resnet20", 3, classes)


def resnet32(*, classes: int = 10) -> CifarResNet:
    """5 blocks a stage: 0.46 million parameters."""
    return CifarResNet("resnet32", 5, classes)


def resnet44(*, classes: int = 10) -> CifarResNet:
    """7 blocks a stage: 0.66 million parameters."""
    return CifarResNet("resnet44", 7, classes)


def resnet56(*, classes: int = 10) -> CifarResNet:
    """9 blocks a stage: 0.85 million parameters."""
    return CifarResNet("resnet56", 9, classes)


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    rest = (Block(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(Block(in_channels, channels, stride), *rest)
