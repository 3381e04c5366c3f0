"""A small convolutional network for 8x8 grey digits; ours, made to train in seconds on a CPU."""

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


class DigitsNet(Network):
    """Three 3x3 convolutions with one max-pool, then two linear layers; BatchNorm and ReLU."""

    def __init__(self, in_channels: int, image_size: int, classes: int) -> None:
        spec = image_spec(
            "digitsnet", in_channels=in_channels, image_size=image_size, classes=classes
        )
        super().__init__(spec, centred(in_channels, image_size), classes)
        self.features = nn.Sequential(
            *conv_bn_relu(in_channels, 16, 3, 1),
            *conv_bn_relu(16, 32, 3, 1),
            nn.MaxPool2d(2),
            *conv_bn_relu(32, 64, 3, 1),
        )
        hidden = linear_bn_relu(64 * halved(image_size, 1, "digitsnet") ** 2, 64)
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, classes))
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, image_size, image_size]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def digitsnet(*, in_channels: int = 1, image_size: int = 8, classes: int = 10) -> DigitsNet:
    """The network of the embedded digits: 90 thousand parameters."""
    return DigitsNet(in_channels, image_size, classes)
