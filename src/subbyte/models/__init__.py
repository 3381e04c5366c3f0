"""Reference networks: built by name, rebuilt from their spec, loaded from float weights."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from subbyte.errors import SubbyteError
from subbyte.models.base import Network, NetworkSpec, glorot_
from subbyte.models.cvnn import cvnn1, cvnn2
from subbyte.models.digitsnet import digitsnet
from subbyte.models.fcnn import fcnn1, fcnn2
from subbyte.models.lenet import lenet5
from subbyte.models.mobilenet import mobilenetv1
from subbyte.models.preprocess import Preprocess
from subbyte.models.resnet import resnet20, resnet32, resnet44, resnet56
from subbyte.models.squeezenet import squeezenet11
from subbyte.models.vgg import vgg7
from subbyte.models.vit import vit1, vit2
from subbyte.models.weights import load_state, load_weights

__all__ = [
    "NETWORKS",
    "Network",
    "NetworkSpec",
    "Preprocess",
    "build",
    "glorot_",
    "load_state",
    "load_weights",
]

NETWORKS: dict[str, Callable[..., Network]] = {
    "fcnn1": fcnn1,
    "fcnn2": fcnn2,
    "cvnn1": cvnn1,
    "cvnn2": cvnn2,
    "vit1": vit1,
    "vit2": vit2,
    "lenet5": lenet5,
    "vgg7": vgg7,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "squeezenet11": squeezenet11,
    "mobilenetv1": mobilenetv1,
    "digitsnet": digitsnet,
}


def build(name: str, **arguments: Any) -> Network:
    """A new network with Glorot weights; `build(net.spec.name, **net.spec.arguments)` is its twin.

    Raises SubbyteError for a name that is not in `NETWORKS`, for an argument the network does not
    have, and for a value it cannot take.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise SubbyteError(f"there is no network '{name}'; {hint}Known: {', '.join(NETWORKS)}.")
    known = inspect.signature(NETWORKS[name]).parameters
    for argument in arguments:
        if argument not in known:
            raise SubbyteError(
                f"network '{name}' has no argument '{argument}'; it takes {', '.join(known)}."
            )
    return NETWORKS[name](**arguments)
