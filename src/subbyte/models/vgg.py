"""VGG7: 2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-1024FC-10 with BatchNorm and ReLU.

Layer sizes from Ternary Weight Networks (Li et al., arXiv:1605.04711), for CIFAR-10.
"""

from torch import Tensor, nn

from subbyte.models.base import (
    Network,
    conv_bn_relu,
    glorot_,
    halved,
    image_spec,
    linear_bn_relu,
)
from subbyte.models.preprocess import centred


class VGG7(Network):
    """Three stages of two 3x3 convolutions and a max-pool, then two linear layers."""

    def __init__(self, in_channels: int, image_size: int, classes: int) -> None:
        spec = image_spec("vgg7", in_channels=in_channels, image_size=image_size, classes=classes)
        super().__init__(spec, centred(in_channels, image_size), classes)
        features: list[nn.Module] = []
        channels = in_channels
        for wide in (128, 256, 512):
            features += conv_bn_relu(channels, wide, 3, 1) + conv_bn_relu(wide, wide, 3, 1)
            features.append(nn.MaxPool2d(2))
            channels = wide
        self.features = nn.Sequential(*features)
        hidden = linear_bn_relu(channels * halved(image_size, 3, "vgg7") ** 2, 1024)
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, classes))
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, image_size, image_size]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def vgg7(*, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> VGG7:
    """VGG7 for CIFAR-10: 13 million parameters."""
    return VGG7(in_channels, image_size, classes)
