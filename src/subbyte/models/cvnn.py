"""Plain convolutional networks, for 32x32 colour images by default.

LowRes (arXiv:2502.08795) trains networks it calls CVNN; its layer sizes are not known, these are
ours: 0.55 and 4.9 million parameters, 39 and 345 million multiply-adds at 32x32.
"""

from torch import Tensor, nn

from subbyte.models.base import (
    Network,
    checked_spec,
    conv_bn_relu,
    glorot_,
    halved,
    linear_bn_relu,
)
from subbyte.models.preprocess import centred


class CVNN(Network):
    """Three stages of two 3x3 convolutions and a max-pool, then two linear layers.

    The stages have `width`, 2 `width` and 4 `width` channels; BatchNorm and ReLU follow every
    layer but the last.
    """

    def __init__(
        self, name: str, width: int, in_channels: int, image_size: int, classes: int
    ) -> None:
        spec = checked_spec(
            name, width=width, in_channels=in_channels, image_size=image_size, classes=classes
        )
        super().__init__(spec, centred(in_channels, image_size), classes)
        features: list[nn.Module] = []
        channels = in_channels
        for wide in (width, 2 * width, 4 * width):
            features += conv_bn_relu(channels, wide, 3, 1) + conv_bn_relu(wide, wide, 3, 1)
            features.append(nn.MaxPool2d(2))
            channels = wide
        self.features = nn.Sequential(*features)
        hidden = linear_bn_relu(channels * halved(image_size, 3, name) ** 2, channels)
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(channels, classes))
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, image_size, image_size]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def cvnn1(
    *, width: int = 32, in_channels: int = 3, image_size: int = 32, classes: int = 10
) -> CVNN:
    """Width 32: 0.55 million parameters, 39 million multiply-adds at 32x32."""
    return CVNN("cvnn1", width, in_channels, image_size, classes)


def cvnn2(
    *, width: int = 96, in_channels: int = 3, image_size: int = 32, classes: int = 10
) -> CVNN:
    """Width 96: 4.9 million parameters, 345 million multiply-adds at 32x32."""
    return CVNN("cvnn2", width, in_channels, image_size, classes)
