"""Float weights from a safetensors file into a reference network."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from subbyte.errors import SubbyteError

COUNTER = "num_batches_tracked"


def load_weights(net: nn.Module, path: Path | str) -> None:
    """Load a safetensors file of float weights into `net`, in place.

    float16 and bfloat16 become the network's float32; a file may leave out BatchNorm's
    `num_batches_tracked`. Nothing is loaded unless everything fits: SubbyteError for a file that is
    missing or damaged, and for keys that are missing, unexpected or of another shape or kind.
    """
    load_state(net, _read(Path(path)), path)


def load_state(net: nn.Module, given: Mapping[str, Tensor], path: Path | str) -> None:
    """`load_weights` for tensors that were read from `path`, whatever its format."""
    expected = net.state_dict()
    optional = {key for key in expected if key.endswith(COUNTER)}
    _refuse(path, "misses", expected.keys() - given.keys() - optional)
    _refuse(path, "has unexpected", given.keys() - expected.keys())
    _refuse(path, "has other shapes for", _misfits(given, expected))
    net.load_state_dict({**expected, **given})


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SubbyteError(f"there is no weights file {path}; check the path.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SubbyteError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again."
        ) from error


def _misfits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Shared keys whose shape or kind (float or not) differs, with both."""
    return [
        f"{key} {_kind(given[key])} (the network: {_kind(expected[key])})"
        for key in expected.keys() & given.keys()
        if _kind(given[key]) != _kind(expected[key])
    ]


def _kind(tensor: Tensor) -> str:
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind}{list(tensor.shape)}"


def _refuse(path: Path | str, problem: str, keys: Iterable[str]) -> None:
    found = sorted(keys)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise SubbyteError(
            f"{path} {problem} {', '.join(found[:3])}{more}; it holds the weights of another "
            "network: build the one it was saved from, with the same arguments."
        )
