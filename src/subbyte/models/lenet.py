"""LeNet5 as ternary-weight papers use it: 32C5-MP2-64C5-MP2-512FC-10 with BatchNorm and ReLU.

Layer sizes from Ternary Weight Networks (Li et al., arXiv:1605.04711), for 28x28 grey digits;
convolutions without padding.
"""

from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.models.base import Network, conv_bn_relu, glorot_, image_spec, linear_bn_relu
from subbyte.models.preprocess import centred


class LeNet5(Network):
    """Two 5x5 convolutions with max-pools, then two linear layers."""

    def __init__(self, in_channels: int, image_size: int, classes: int) -> None:
        spec = image_spec("lenet5", in_channels=in_channels, image_size=image_size, classes=classes)
        super().__init__(spec, centred(in_channels, image_size), classes)
        self.features = nn.Sequential(
            *conv_bn_relu(in_channels, 32, 5, 0),
            nn.MaxPool2d(2),
            *conv_bn_relu(32, 64, 5, 0),
            nn.MaxPool2d(2),
        )
        hidden = linear_bn_relu(64 * _side(image_size) ** 2, 512)
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, classes))
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, image_size, image_size]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def lenet5(*, in_channels: int = 1, image_size: int = 28, classes: int = 10) -> LeNet5:
    """LeNet5 for MNIST: 0.58 million parameters."""
    return LeNet5(in_channels, image_size, classes)


def _side(image_size: int) -> int:
    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise SubbyteError(
            f"image_size={image_size} is too small for network 'lenet5', whose convolutions are "
            "not padded; use 16 or more."
        )
    return side
