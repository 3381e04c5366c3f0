"""Fully connected networks, for 32x32 colour images by default.

LowRes (arXiv:2502.08795) trains networks it calls FCNN; its layer sizes are not known, these are
ours: 1.7 and 8.9 million parameters.
"""

from itertools import pairwise

from torch import Tensor, nn

from subbyte.models.base import Network, glorot_, image_spec
from subbyte.models.preprocess import centred


class FCNN(Network):
    """Linear layers with ReLU between them, on the flattened image."""

    def __init__(
        self, name: str, widths: tuple[int, ...], in_channels: int, image_size: int, classes: int
    ) -> None:
        spec = image_spec(name, in_channels=in_channels, image_size=image_size, classes=classes)
        super().__init__(spec, centred(in_channels, image_size), classes)
        sizes = (in_channels * image_size**2, *widths)
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, image_size, image_size]."""
        logits: Tensor = self.layers(x)
        return logits


def fcnn1(*, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> FCNN:
    """Hidden layers of 512 and 256: 1.7 million parameters."""
    return FCNN("fcnn1", (512, 256), in_channels, image_size, classes)


def fcnn2(*, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> FCNN:
    """Hidden layers of 2048, 1024 and 512: 8.9 million parameters."""
    return FCNN("fcnn2", (2048, 1024, 512), in_channels, image_size, classes)
