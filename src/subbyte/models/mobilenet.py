"""MobileNetV1 for ImageNet, with a width multiplier.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", arXiv:1704.04861, as TensorFlow published it: BatchNorm eps 1e-3, ReLU6, padding
SAME. At stride 2 that padding is asymmetric; it is done outside the convolution, so that every
convolution is a plain nn.Conv2d.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.errors import SubbyteError
from subbyte.models.base import Network, NetworkSpec, checked_spec, glorot_
from subbyte.models.preprocess import Preprocess

CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class MobileNetV1(Network):
    """A convolution and 13 pairs of depthwise and pointwise convolutions, mean, linear.

    `features` is one flat sequence, so that its keys are those of the published weights.
    """

    def __init__(self, width: float, image_size: int, classes: int) -> None:
        spec = _spec(width, image_size, classes)
        ones = (1.0, 1.0, 1.0)
        preprocess = Preprocess((image_size, image_size), mean=ones, std=ones, scale=127.5)
        super().__init__(spec, preprocess, classes)
        channels = [max(1, int(width * c)) for c in (32, *CHANNELS)]
        layers = _conv(3, channels[0], 3, stride=2)
        for (fan_in, fan_out), stride in zip(pairwise(channels), STRIDES, strict=True):
            layers += _conv(fan_in, fan_in, 3, stride=stride, groups=fan_in)
            layers += _conv(fan_in, fan_out, 1)
        self.padded = frozenset(i for i, layer in enumerate(layers) if _is_strided(layer))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels[-1], classes)
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, image_size, image_size]."""
        for i, layer in enumerate(self.features):
            x = layer(_pad_same(x) if i in self.padded else x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def mobilenetv1(*, width: float = 0.75, image_size: int = 224, classes: int = 1000) -> MobileNetV1:
    """MobileNetV1: 2.6 million parameters at width 0.75, 4.2 at width 1."""
    return MobileNetV1(width, image_size, classes)


def _spec(width: float, image_size: int, classes: int) -> NetworkSpec:
    if type(width) not in (int, float) or not 0 < width <= 4:
        raise SubbyteError(
            f"width={width!r} of network 'mobilenetv1' is not a number above 0 and up to 4; "
            "the usual widths are 0.25, 0.5, 0.75 and 1."
        )
    spec = checked_spec("mobilenetv1", image_size=image_size, classes=classes)
    return NetworkSpec(spec.name, {"width": width, **spec.arguments})


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel // 2 if stride == 1 else 0
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels, eps=1e-3), nn.ReLU6()]


def _is_strided(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)


def _pad_same(x: Tensor) -> Tensor:
    """TensorFlow's SAME for kernel 3, stride 2: 1 after an even length, 1 around an odd one."""
    height, width = x.shape[-2:]
    return F.pad(x, (width % 2, 1, height % 2, 1))
