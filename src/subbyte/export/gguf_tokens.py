"""The tokenizer of a language model as keys of a GGUF file, as llama.cpp's converter has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of llama.cpp
_SPECIAL = ("bos", "eos", "unk", "sep", "pad")


def add_tokenizer(writer: Any, config: Any) -> list[str]:
    """Adds the tokenizer of the folder that a network was opened from; returns notes.

    Byte-level BPE (tokenizer.json) is held; of another kind, or where there is no folder, a note
    says that the file has none.
    """
    folder = Path(str(getattr(config, "name_or_path", "") or ""))
    file = folder / "tokenizer.json"
    if not str(folder) or not file.is_file():
        return ["no tokenizer: the network was not opened from a folder with a tokenizer.json"]
    data = json.loads(file.read_text(encoding="utf-8"))
    if data["model"].get("type", "BPE") != "BPE" or data["model"].get("byte_fallback"):
        return [f"no tokenizer: a {data['model'].get('type')} one is not byte-level BPE"]
    pre, notes = pre_tokenizer(data.get("pre_tokenizer"))
    settings = _settings(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens, types = tokens_of(data, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    )
    _add_special(writer, settings, {t: i for i, t in enumerate(tokens)}, config)
    return notes


def tokens_of(data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens, by number; those that no text has are [PAD<number>]."""
    by_number = {number: (text, NORMAL) for text, number in data["model"]["vocab"].items()}
    for added in data.get("added_tokens", ()):
        kind = CONTROL if added.get("special") else USER_DEFINED
        by_number[added["id"]] = (added["content"], kind)
    found = [by_number.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    return [text for text, _ in found], [kind for _, kind in found]


def pre_tokenizer(data: Any) -> tuple[str, list[str]]:
    """llama.cpp's name of a pre-tokenizer, by what it does; and a note where it has none."""
    steps = [] if data is None else data.get("pretokenizers", [data])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm", []
    if kinds == ["ByteLevel"]:
        return "gpt-2", []
    if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}" in json.dumps(steps[0]).replace(
        "\\\\", "\\"
    ):
        return "llama-bpe", []
    return "default", [
        f"the pre-tokenizer {kinds} has no name in llama.cpp here; 'default' is written"
    ]


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _add_special(
    writer: Any, settings: Mapping[str, Any], numbers: Mapping[str, int], config: Any
) -> None:
    for name in _SPECIAL:
        number = _number(settings.get(f"{name}_token"), numbers)
        if number is None:
            number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int):
            getattr(writer, f"add_{name}_token_id")(number)
    for name in ("bos", "eos"):
        if isinstance(settings.get(f"add_{name}_token"), bool):
            getattr(writer, f"add_add_{name}_token")(settings[f"add_{name}_token"])
    writer.add_add_space_prefix(bool(settings.get("add_prefix_space", False)))
    template = settings.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _number(token: Any, numbers: Mapping[str, int]) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return numbers.get(text) if isinstance(text, str) else None
