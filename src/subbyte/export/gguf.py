"""GGUF: Llama-form language models of `transformers` for llama.cpp.

A packed weight becomes a type of ggml only where that type holds it to the last bit: rows of blocks
of 32 or 256 whole numbers, each block with one float16 scale. What does not fit is refused, with
the grid that would. Names of keys and tensors are those of llama.cpp's converter, and so is the
order of rows of the query and key projections.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from subbyte.core.functional import n_groups, spread
from subbyte.core.grids import Grid
from subbyte.errors import SubbyteError
from subbyte.export.base import Built, Exporter, Request
from subbyte.export.gguf_tokens import add_tokenizer
from subbyte.modules import PackedWeight

FORMS = ("auto", "small", "fast")
LLAMA = ("llama", "mistral")


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of ggml. block: weights with one float16 scale. lowest, highest: of their numbers."""

    name: str
    block: int
    lowest: int
    highest: int
    bits: float


SMALL = (
    Kind("TQ1_0", 256, -1, 1, 1.6875), Kind("TQ2_0", 256, -1, 2, 2.0625),
    Kind("Q4_0", 32, -8, 7, 4.5), Kind("Q8_0", 32, -128, 127, 8.5),
)  # fmt: skip
FAST = SMALL[1:]


def build(request: Request) -> Built:
    """One .gguf. Raises SubbyteError for networks of another form, and grids that do not fit."""
    net: Any = request.net
    config = _config(net)
    kinds = FAST if request.form == "fast" else SMALL
    tensors = list(_tensors(net, config, kinds))
    notes: list[str] = []
    data = _file(request.name, config, tensors, notes)
    form = "fast" if request.form == "fast" else "small"
    return Built({".gguf": data}, form, tuple((t.layer, t.kind) for t in tensors), tuple(notes))


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One tensor of the file. data: float32, or the bytes of blocks [rows, bytes]."""

    name: str
    layer: str
    kind: str
    data: NDArray[Any]


def _config(net: Any) -> Any:
    """The settings. Raises SubbyteError for what is no Llama of `transformers`."""
    config: Any = getattr(net, "config", None)
    kind = getattr(config, "model_type", type(net).__name__)
    if kind not in LLAMA or not hasattr(net, "lm_head"):
        raise SubbyteError(
            f"a .gguf file holds Llama-form language models of transformers ({', '.join(LLAMA)}, "
            f"with their head); this is {kind}"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise SubbyteError(
            f"rope_type '{rope['rope_type']}' is not held by .gguf files here, 'default' is"
        )
    if config.hidden_act != "silu":
        raise SubbyteError(
            f"hidden_act '{config.hidden_act}' is not a Llama's in .gguf files, 'silu' is"
        )
    return config


# ---------------------------------------------------------------- tensors


def _tensors(net: nn.Module, config: Any, kinds: Sequence[Kind]) -> Iterator[Stored]:
    """Every tensor, in the order of the network's modules."""
    names = _names(config.num_hidden_layers)
    for layer, weight in _weights(net):
        stored = names.get_name(layer, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise SubbyteError(f"'{layer}' has no place in a Llama's .gguf file")
        if layer == "lm_head.weight" and _is_tied(net, config):
            continue  # llama.cpp takes the embeddings
        yield _stored(stored, layer, weight, (config, kinds))


def _names(n_layers: int) -> Any:
    gguf: Any = importlib.import_module("gguf")
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layers)


def _weights(net: nn.Module) -> Iterator[tuple[str, PackedWeight | Tensor]]:
    """What `transformers` calls each tensor, and the tensor; packed ones whole."""
    packed = [n for n, m in net.named_modules() if isinstance(m, PackedWeight)]
    for name, module in net.named_modules():
        if isinstance(module, PackedWeight):
            yield name.removesuffix("packed") + "weight", module
        elif not any(name.startswith(p) for p in packed):
            for own, value in module.named_parameters(recurse=False, remove_duplicate=False):
                yield f"{name}.{own}", value.detach()


def _is_tied(net: Any, config: Any) -> bool:
    """Whether the head is the table of embeddings, to the bit."""
    if not config.tie_word_embeddings:
        return False
    return torch.equal(net.lm_head.weight, net.get_input_embeddings().weight)


def _stored(name: str, layer: str, weight: PackedWeight | Tensor, how: Any) -> Stored:
    config, kinds = how
    order = _order(layer, config, weight.shape[0])
    if isinstance(weight, Tensor):
        return Stored(name, layer, "F32", weight.float().numpy()[order])
    kind, data = blocks(layer.removesuffix(".weight"), weight, kinds)
    return Stored(name, layer, kind.name, data[order])


def _order(layer: str, config: Any, rows: int) -> Any:
    """Rows as llama.cpp turns them: it pairs neighbours where `transformers` pairs halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, n in heads.items():
        if f".{part}." in layer:
            return np.arange(rows).reshape(n, 2, rows // n // 2).swapaxes(1, 2).reshape(-1)
    return np.arange(rows)


# ---------------------------------------------------------------- blocks


def blocks(
    name: str, packed: PackedWeight, kinds: Sequence[Kind]
) -> tuple[Kind, NDArray[np.uint8]]:
    """The smallest type that holds a weight [rows, width] to the last bit, and its bytes [rows, n].

    Raises SubbyteError that names the layer and the nearest grid that fits.
    """
    if packed.up is not None:
        raise SubbyteError(
            f"layer '{name}' has an adapter, which .gguf files do not hold; quantize it without "
            "one (max_rank=0)"
        )
    whole, unit = whole_levels(packed.grid)
    reasons = []
    for kind in kinds:
        found = _fitted(packed, kind, whole, unit)
        if not isinstance(found, str):
            return kind, found
        reasons.append(f"{kind.name}: {found}")
    raise SubbyteError(
        f"layer '{name}' does not fit a .gguf file to the last bit ({'; '.join(reasons)}); "
        f"{nearest(packed)}"
    )


def whole_levels(grid: Grid) -> tuple[NDArray[np.int64] | None, float]:
    """Levels as whole numbers times a unit; None where no unit is found."""
    levels = np.array(grid.levels)
    gap = float(np.diff(levels).min())
    for unit in (gap, gap / 2):
        whole = np.round(levels / unit)
        if np.abs(whole).max() <= 255 and np.allclose(
            levels, whole * unit, rtol=1e-12, atol=1e-12 * gap
        ):
            return whole.astype(np.int64), unit
    return None, gap


def _fitted(packed: PackedWeight, kind: Kind, whole: Any, unit: float) -> NDArray[np.uint8] | str:
    """The bytes of a weight in a type, or why not."""
    rows, width = packed.shape
    if width % kind.block:
        return f"rows of {width} are no multiple of {kind.block}"
    if whole is None or whole.min() < kind.lowest or whole.max() > kind.highest:
        return f"levels are not whole numbers {kind.lowest} to {kind.highest} times one unit"
    scale = _scales(packed).reshape(rows, -1, kind.block)
    if (scale != scale[..., :1]).any():
        return f"blocks of {kind.block} have more than one scale"
    exact = scale[..., 0].astype(np.float64) * unit
    with np.errstate(over="ignore"):
        step = exact.astype(np.float16)
    codes = whole[packed.codes().numpy()].reshape(rows, -1, kind.block)
    found = step.astype(np.float32)[..., None] * codes.astype(np.float32)
    wanted = packed.matrix().decoded().numpy().reshape(found.shape)
    if not np.array_equal(found, wanted):
        return "float16 does not hold its scales"
    return _BYTES[kind.name](step, codes).reshape(rows, -1)


def _scales(packed: PackedWeight) -> NDArray[np.float32]:
    """The scale of each weight."""
    tensor = packed.quantized()
    assert tensor.scale.numel() == n_groups(packed.shape, packed.grid)
    return spread(tensor.scale, packed.shape, packed.grid).expand(packed.shape).numpy()


def nearest(packed: PackedWeight) -> str:
    """A grid close to the weight's that fits."""
    n, width = packed.grid.n_levels, packed.shape[1]
    if width % 32:
        return f"no grid fits rows of {width}: keep the layer in float (a rule with method=None)"
    odd = min(255, n + 1 - n % 2)
    top = odd // 2
    block = 256 if odd == 3 and width % 256 == 0 else 32
    return (
        f"the nearest grid that fits has the whole levels -{top} to {top}, scales per channel or "
        f"per group of a multiple of {block}, and scale_domain 'float16' (or 'power_of_two')"
    )


def _halves(step: NDArray[np.float16]) -> NDArray[np.uint8]:
    return step[..., None].view(np.uint8)


def _q8(step: NDArray[np.float16], codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.concatenate([_halves(step), codes.astype(np.int8).view(np.uint8)], -1)


def _q4(step: NDArray[np.float16], codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    low, high = np.split((codes + 8).astype(np.uint8), 2, -1)
    return np.concatenate([_halves(step), low | (high << 4)], -1)


def _tq2(step: NDArray[np.float16], codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    digits = (codes + 1).astype(np.uint8).reshape(*codes.shape[:-1], 2, 4, 32)
    packed = (digits << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(-2, dtype=np.uint8)
    return np.concatenate([packed.reshape(*codes.shape[:-1], 64), _halves(step)], -1)


def _tq1(step: NDArray[np.float16], codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Five digits of base 3 per byte, as a fraction of 256 rounded up; the last 16 in fours."""
    lead, digits = codes.shape[:-1], codes + 1
    powers = np.array([81, 27, 9, 3, 1])[:, None]
    parts = (
        (digits[..., :160].reshape(*lead, 5, 32) * powers).sum(-2),
        (digits[..., 160:240].reshape(*lead, 5, 16) * powers).sum(-2),
        (digits[..., 240:].reshape(*lead, 4, 4) * powers[:4]).sum(-2),
    )
    values = (np.concatenate(parts, -1) * 256 + 242) // 243
    return np.concatenate([values.astype(np.uint8), _halves(step)], -1)


_BYTES = {"TQ1_0": _tq1, "TQ2_0": _tq2, "Q4_0": _q4, "Q8_0": _q8}


# ---------------------------------------------------------------- the file


def _file(name: str, config: Any, tensors: Sequence[Stored], notes: list[str]) -> bytes:
    gguf: Any = importlib.import_module("gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        _add_settings(writer, name, config, tensors)
        notes += add_tokenizer(writer, config)
        for t in tensors:
            kind = None if t.kind == "F32" else gguf.GGMLQuantizationType[t.kind]
            writer.add_tensor(t.name, np.ascontiguousarray(t.data), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


_FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37}


def _add_settings(writer: Any, name: str, config: Any, tensors: Sequence[Stored]) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(str(getattr(config, "name_or_path", "") or name)).name)
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(_FILE_TYPES[_most(tensors)])
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    if width * heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    writer.add_quantization_version(2)


def _rope_base(config: Any) -> float:
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _most(tensors: Sequence[Stored]) -> str:
    """The type of most matrices."""
    kinds = [t.kind for t in tensors if t.data.ndim == 2]
    return max(sorted(set(kinds)), key=kinds.count)


EXPORTER = Exporter(".gguf", "GGUF", FORMS, build, ("gguf",), "gguf")
