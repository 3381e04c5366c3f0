"""A packed file back into the packed model that was saved, bit for bit."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from subbyte.core.as_linear import with_linears
from subbyte.core.quantized import Quantized
from subbyte.core.ready import copied
from subbyte.core.sites import sites
from subbyte.errors import SubbyteError, of_file
from subbyte.graph.network import place_unread, skeleton, take_activations
from subbyte.graph.trace import CONSTANTS
from subbyte.kernels import Precision
from subbyte.models import Preprocess, build
from subbyte.modules import pack
from subbyte.modules.absorb import restore
from subbyte.storage.digests import HEADER, check_header, check_tensors
from subbyte.storage.manifest import Artifact, LayerEntry, parse
from subbyte.storage.writer import packed_layers, tied_names


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    precision: Precision = "auto",
    verify: bool = True,
) -> nn.Module:
    """The packed model in a file, in eval mode, on the CPU.

    A zoo network rebuilds itself from the manifest, and a file that was saved with an example opens
    by its program; for any other pass `model`, the float network (its weights do not matter; it
    stays as it is). precision: of products, see `pack`. verify: by the file's checksums. Without,
    opening takes no longer for a large file: the codes of a layer are read and checked when the
    layer first runs. Packed weights stay in the file, which is mapped: replace it as `save` does,
    by another, and do not write into it while the network is in use. Raises SubbyteError for a file
    that is missing, damaged, of a newer version, or of another network.
    """
    artifact = read(path, verify=verify)
    try:
        return assemble(artifact, model, precision=precision)
    except SubbyteError as error:
        raise of_file(path, error) from None


def assemble(
    artifact: Artifact, model: nn.Module | None = None, *, precision: Precision = "auto"
) -> nn.Module:
    """The packed model of what was read from a file; as `load`, whose errors name the file too."""
    program = artifact.program if model is None and artifact.network is None else None
    if program is not None:
        state = _state_of_program(artifact)
        like = skeleton(program, state, "Program")  # without memory
        _check_entries(artifact.entries, like)
    else:
        like = _skeleton(artifact, model)
    like = _sharing(like, artifact.shared)
    net = pack(Quantized(like, artifact.layers()), precision=precision)
    restore(net, artifact.affine)
    if program is not None:
        take_activations(net, program)
        if artifact.preprocess is not None:
            vars(net)["preprocess"] = _preprocess(artifact.preprocess)
        place_unread(net, program, state)
    _load_state(net, artifact)
    return net


def read(path: str | Path, *, verify: bool = True) -> Artifact:
    """The file's manifest and tensors, checked; also by its checksums, if `verify` and if it has
    any. Raises SubbyteError naming file and fault."""
    path = Path(path)
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise SubbyteError(f"{path}: {what}; give the path of a packed .safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            held = _mapped(path, [name for name in names if name.rpartition(".")[2] == "codes"])
            tensors = {n: held[n] if n in held else file.get_tensor(n) for n in names}
    except (SafetensorError, OSError) as error:
        raise SubbyteError(
            f"{path}: not a whole safetensors file ({error!s:.200}); it is damaged or was cut off: "
            "make or fetch it again"
        ) from None
    try:
        found = parse(metadata, tensors, path.stat().st_size, checked=verify)
        if verify and (found.digests or HEADER in metadata):
            check_header(path, metadata)
            check_tensors(tensors, found.names, found.digests)
        return found
    except SubbyteError as error:
        raise of_file(path, error) from None


def _mapped(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a whole safetensors file as parts of the mapped file; nothing is read yet.

    Each has a storage of its own, so that a copy of one layer is no copy of the file. Words that do
    not lie on 8 bytes, as the kernels read them, are left out.
    """
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(held[:8], "little")
    header = json.loads(held[8:start])
    found = {}
    for name in names:
        first, end = (start + offset for offset in header[name]["data_offsets"])
        if first % 8 == 0 and end > first and header[name]["dtype"] == "U8":
            found[name] = torch.frombuffer(held, dtype=torch.uint8, count=end - first, offset=first)
    return found


def _skeleton(artifact: Artifact, model: nn.Module | None) -> nn.Module:
    """The float network that the file is of: the one given, or the zoo's, checked to fit."""
    if model is not None:
        model = with_linears(model, artifact.entries)
        _check_entries(artifact.entries, model)
        return model
    if artifact.network is None:
        raise SubbyteError(
            "the file holds neither a zoo network nor a program; pass yours: load(path, model=net)"
        )
    try:
        name, arguments = artifact.network["name"], dict(artifact.network["arguments"])
        with torch.device("meta"):  # without memory: the file fills it
            like = build(name, **arguments)
    except SubbyteError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise SubbyteError(f"the manifest's network is malformed ({str(error)[:200]!r})") from None
    _check_entries(artifact.entries, like)
    return like


def _sharing(like: nn.Module, shared: Mapping[str, str]) -> nn.Module:
    """The network with the weights shared that are in the file; itself, if it shares them."""
    held = dict(like.named_modules(remove_duplicate=False))
    for name in (*shared, *shared.values()):
        if getattr(held.get(name), "weight", None) is None:
            raise SubbyteError(f"the network has no layer '{name[:99]}' to share a weight with")
    apart = [a for a, name in shared.items() if held[a].weight is not held[name].weight]
    if not apart:
        return like
    like = copied(like)
    for alias in apart:
        own, other = like.get_submodule(alias), like.get_submodule(shared[alias])
        if own.weight.shape != other.weight.shape:
            raise SubbyteError(f"layer '{alias[:99]}' of the network has no weight to share")
        own.weight = other.weight
    return like


def _state_of_program(artifact: Artifact) -> dict[str, Tensor]:
    """The file's tensors that are no packed layer's, under every name that they go by."""
    state = artifact.state()
    return state | {alias: state[name] for alias, name in artifact.ties.items() if name in state}


def _preprocess(value: Mapping[str, Any]) -> Preprocess:
    try:
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return Preprocess(**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise SubbyteError(f"the manifest's preprocess is malformed ({str(error)[:99]})") from None


def _check_entries(entries: Mapping[str, LayerEntry], model: nn.Module) -> None:
    """The file is of this network, before anything is decoded."""
    known = {site.name: site for site in sites(model)}
    for name, entry in entries.items():
        if name not in known:
            raise SubbyteError(_no_layer(name, list(known)))
        site = known[name]
        if (entry.type, entry.shape) != (site.type, site.shape):
            raise SubbyteError(
                f"layer '{name}' is {entry.type} {entry.shape} in the file, {site.type} "
                f"{site.shape} in the network"
            )


def _no_layer(name: str, known: list[str]) -> str:
    for prefix, wrapper in (("_orig_mod.", "torch.compile"), ("module.", "DataParallel or DDP")):
        if prefix in name and name.replace(prefix, "") in known:
            return (
                f"layer '{name}' of the file has the prefix '{prefix}' of {wrapper}; save the "
                "network that was wrapped, or wrap the one you load into in the same way"
            )
    more = ", ..." if len(known) > 8 else ""
    return f"the network has no layer '{name[:200]}'; it has {', '.join(known[:8])}{more}"


def _load_state(net: nn.Module, artifact: Artifact) -> None:
    """Fill everything but the packed layers; names and shapes must agree exactly."""
    own = net.state_dict()
    state = {
        name: value
        for name, value in artifact.state().items()
        if name in own or not name.startswith(f"{CONSTANTS}.")  # which only a program needs
    }
    for name, value in state.items():
        if name not in own:
            raise SubbyteError(f"the network has no '{name}'; the file is of another network")
        if own[name].shape != value.shape:
            raise SubbyteError(
                f"'{name}' has shape {tuple(value.shape)} in the file, {tuple(own[name].shape)} "
                "in the network"
            )
        if own[name].is_floating_point() != value.is_floating_point():
            raise SubbyteError(
                f"'{name}' is {value.dtype} in the file, {own[name].dtype} in the network"
            )
    taken = frozenset().union(*(layer.keys for layer in packed_layers(net)))
    left = sorted(set(own) - set(artifact.state_names) - taken - set(artifact.ties))
    if left:
        raise SubbyteError(f"the file has no '{left[0]}', which the network needs")
    ties = {**tied_names(net), **artifact.ties}
    # A tensor in a file lies where it lies; float products differ in the last bit where memory is
    # not aligned as torch aligns its own.
    fresh = {name: value.clone() for name, value in state.items()}
    net.load_state_dict(fresh, strict=False, assign=True)  # dtypes are the file's
    _tie(net, ties, artifact)
    empty = [name for name, held in net.named_buffers() if held.is_meta]
    if empty:  # a buffer that is not persistent
        raise SubbyteError(
            f"buffer '{empty[0][:200]}' of the network is on the meta device, and a file holds no "
            "buffer of its kind; build the network in memory"
        )


def _tie(net: nn.Module, ties: Mapping[str, str], artifact: Artifact) -> None:
    """One tensor for the names that share one: as the file says, or as the network has them, unless
    the file holds them as two that differ."""
    state, modules = artifact.state(), dict(net.named_modules(remove_duplicate=False))
    for alias, name in ties.items():
        if name not in state or (alias in state and not torch.equal(state[alias], state[name])):
            continue
        from_, to = _place(modules, name), _place(modules, alias)
        if from_ is None or to is None or from_[0][from_[1]].shape != to[0][to[1]].shape:
            raise SubbyteError(f"the file ties '{alias}' to '{name}', the network cannot")
        to[0][to[1]] = from_[0][from_[1]]


def _place(modules: Mapping[str, nn.Module], name: str) -> tuple[dict[str, Any], str] | None:
    """The dictionary that holds a parameter or buffer, and its name there."""
    path, _, own = name.rpartition(".")
    module = modules.get(path)
    for held in () if module is None else (module._parameters, module._buffers):
        if own in held:
            return held, own
    return None
