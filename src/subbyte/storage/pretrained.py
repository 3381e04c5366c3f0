"""Folders of `transformers`: config and tokenizer as they were, the weights in one packed file.

`transformers` is asked for when such a folder is opened, and never before.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subbyte.errors import SubbyteError, of_file
from subbyte.kernels import Precision
from subbyte.storage.reader import assemble, read
from subbyte.storage.writer import save

CONFIG, PACKED = "config.json", "subbyte.safetensors"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
            "*.safetensors.index.json", "*.bin.index.json")  # fmt: skip


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder of `transformers`, or one of GGUF files."""
    path = Path(path)
    return path.is_dir() and ((path / CONFIG).is_file() or any(path.glob("*.gguf")))


def float_model(folder: str | Path) -> nn.Module:
    """The float32 model in a folder, of the class that its config names; in eval mode.

    A folder without a config may hold one GGUF file. Raises SubbyteError for a folder without
    weights, and for what `transformers` refuses (its own words in one line).
    """
    folder, library = Path(folder), _transformers()
    gguf = sorted(folder.glob("*.gguf"))
    if not (folder / CONFIG).is_file() and len(gguf) == 1:
        model = _asked(
            folder, library.AutoModelForCausalLM.from_pretrained, str(folder),
            gguf_file=gguf[0].name, dtype=torch.float32,
        )  # fmt: skip
        vars(model.config).pop("quantization_config", None)  # of the file; these are floats now
        vars(model)["is_quantized"] = False
        return model.eval()  # type: ignore[no-any-return]
    if (folder / PACKED).is_file():
        raise SubbyteError(f"{folder} is packed already; give the folder of the float model")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise SubbyteError(f"{folder} has no weights; expected model.safetensors beside {CONFIG}")
    kind = _class_of(library, folder)
    model = _asked(folder, kind.from_pretrained, str(folder), dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def empty_model(folder: str | Path) -> nn.Module:
    """The model that the config in a folder describes, in eval mode: its parameters are on the meta
    device and take no memory, its buffers are whole."""
    folder, library = Path(folder), _transformers()
    kind = _class_of(library, folder)
    config = _asked(folder, library.AutoConfig.from_pretrained, str(folder))
    with _without_memory():
        model = _asked(folder, kind, config)
    return model.eval()  # type: ignore[no-any-return]


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer in a folder."""
    folder, library = Path(folder), _transformers()
    gguf = {} if (folder / CONFIG).is_file() else {"gguf_file": next(folder.glob("*.gguf")).name}
    return _asked(folder, library.AutoTokenizer.from_pretrained, str(folder), **gguf)


def save_pretrained(net: nn.Module, folder: str | Path, out: str | Path) -> int:
    """Write a packed model of `float_model(folder)`; returns the bytes of the packed file.

    Everything in the folder that is no weight goes along as it is; of a GGUF file, its config and
    tokenizer as `transformers` writes them.
    """
    folder, out = Path(folder), Path(out)
    if out.resolve() == folder.resolve():
        raise SubbyteError(f"{out} is the folder of the float model; give another one to write")
    if out.exists() and not out.is_dir():
        raise SubbyteError(f"cannot write {out}: it is no folder; give the name of one")
    return _write(net, folder, out)


def _write(net: nn.Module, folder: Path, out: Path) -> int:
    try:
        out.mkdir(parents=True, exist_ok=True)
        weights = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
        for path in sorted(folder.iterdir()):
            if path in weights:
                continue
            if path.is_dir():
                shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            else:
                shutil.copy2(path, out / path.name)
    except OSError as error:
        raise SubbyteError(f"cannot write {out}: {error.strerror or error}") from None
    if not (out / CONFIG).is_file():  # a GGUF file alone
        net.config.save_pretrained(str(out))  # type: ignore[union-attr,operator]
        tokenizer_of(folder).save_pretrained(str(out))
    return save(net, out / PACKED)  # last: a folder without it is no packed one


def load_pretrained(
    folder: str | Path, *, precision: Precision = "auto", verify: bool = True
) -> nn.Module:
    """The `transformers` model in a packed folder, its layers packed, in eval mode.

    `generate`, pipelines and `save_pretrained` of config and tokenizer work on it. Raises
    SubbyteError for a folder without a packed file, or what the reader refuses.
    """
    folder = Path(folder)
    if not (folder / PACKED).is_file():
        raise SubbyteError(
            f"{folder} is a folder and has no {PACKED}; make it with `subbyte quantize FOLDER "
            f"--out {folder}`, or give the path of a packed file"
        )
    artifact, like = read(folder / PACKED, verify=verify), empty_model(folder)
    try:
        net = assemble(artifact, like, precision=precision)
    except SubbyteError as error:
        raise of_file(folder / PACKED, error) from None
    if (folder / "generation_config.json").is_file():
        library = _transformers()
        made = _asked(folder, library.GenerationConfig.from_pretrained, str(folder))
        vars(net)["generation_config"] = made
    return net


def _class_of(library: Any, folder: Path) -> Any:
    """The model class that the config names."""
    try:
        names = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise SubbyteError(f"{folder / CONFIG} cannot be read: {error}") from None
    for name in names:
        kind = getattr(library, str(name), None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    raise SubbyteError(
        f"{folder / CONFIG} names the architectures {names!r:.200}, none of which transformers "
        f"{library.__version__} has"
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SubbyteError(
            f"a folder of transformers needs the package transformers ({error}); "
            "pip install transformers"
        ) from None


def _asked(folder: Path, function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(...), its errors in one line."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # transformers raises anything
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise SubbyteError(f"{folder}: {type(error).__name__}: {first}") from None


@contextmanager
def _without_memory() -> Iterator[None]:
    """Networks built here have parameters without memory; their buffers are whole."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and not value.is_meta:
            value = nn.Parameter(value.detach().to("meta"), requires_grad=False)
        register(module, name, value)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
