"""SqueezeNet 1.1 for ImageNet.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", arXiv:1602.07360,
in the 1.1 form the authors published with Caffe: BGR input 0..255 minus the mean (104, 117, 123),
no BatchNorm, a classifier that is a 1x1 convolution with padding 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.models.base import Network, checked_spec, glorot_
from subbyte.models.preprocess import Preprocess


class Fire(nn.Module):
    """A 1x1 convolution to few channels, then 1x1 and 3x3 convolutions side by side."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, 2 expand, h, w] of x [n, in_channels, h, w]."""
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(Network):
    """A convolution, eight Fire modules with three max-pools, a 1x1 classifier, mean over space."""

    def __init__(self, image_size: int, classes: int) -> None:
        spec = checked_spec("squeezenet11", image_size=image_size, classes=classes)
        size = (image_size, image_size)
        preprocess = Preprocess(size, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), scale=1.0, bgr=True)
        super().__init__(spec, preprocess, classes)
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            _pool(),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            _pool(),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            _pool(),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Conv2d(512, classes, 1, padding=1)
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, image_size, image_size]."""
        return F.relu(self.classifier(self.features(x))).mean((2, 3))


def squeezenet11(*, image_size: int = 227, classes: int = 1000) -> SqueezeNet:
    """SqueezeNet 1.1: 1.24 million parameters."""
    return SqueezeNet(image_size, classes)


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
