"""The memory that it takes to quantize a network of 2 GB on disk block by block.

    python benchmarks/streaming.py --codes rtn
    python benchmarks/streaming.py --codes gptq --windows 8

Writes a folder of a Llama with random float32 weights, quantizes it to 16 levels with a scale per
64 inputs in a process of its own (one thread, random tokens), saves and opens the packed folder,
and adds a line to benchmarks/results/streaming.jsonl. Memory is the peak of the process (VmHWM,
which counts pages of mapped files), less what it held once its imports were done.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import append, revision
from safetensors.torch import save_file

import subbyte as sb
from subbyte.storage import save_pretrained
from subbyte.storage.pretrained import PACKED, empty_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARD = 2**28  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", choices=("gptq", "rtn", "k-sigma"), default="rtn")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "float"
        n_bytes = made(folder, given.layers)
        told = [sys.executable, __file__, "--child", str(folder), given.codes,
                str(given.windows), str(given.tokens)]  # fmt: skip
        run = json.loads(subprocess.run(told, check=True, stdout=subprocess.PIPE).stdout)
    append("streaming", {
        "revision": revision(), "float_bytes": n_bytes, "layers": given.layers,
        "codes": given.codes, "windows": given.windows, "tokens": given.tokens, **run,
    })  # fmt: skip


def made(folder: Path, layers: int) -> int:
    """Writes the float network; returns the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    for name, like in empty_model(folder).named_parameters():
        norm = like.ndim == 1
        part[name] = torch.ones(like.shape) if norm else torch.empty(like.shape)
        if not norm:
            part[name].normal_(0, 0.02, generator=generator)
        if sum(x.nbytes for x in part.values()) > SHARD:
            written(folder, part, index)
    if part:
        written(folder, part, index)
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def written(folder: Path, part: dict[str, torch.Tensor], index: dict[str, str]) -> None:
    """A shard, whose tensors are taken out of `part`."""
    file = f"model-{len(set(index.values())) + 1:05}.safetensors"
    save_file(part, folder / file)
    index |= dict.fromkeys(part, file)
    part.clear()


def child(folder: str, codes: str, windows: str, tokens: str) -> None:
    torch.set_num_threads(1)
    empty_model(folder)  # imports what transformers imports late
    before, start = peak(), time.perf_counter()
    ids = torch.randint(3, CONFIG["vocab_size"], (int(windows), int(tokens)),
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
    group = None if codes == "k-sigma" else 64
    method = sb.CoRa(levels=16, group=group, codes=codes, tune=0)
    done = sb.quantize_folder(
        folder, method, calibration=[{"input_ids": ids}], task="language", listener=Told()
    )
    quantized = peak()
    out = Path(folder).parent / "packed"
    n_bytes = save_pretrained(sb.pack(done), folder, out)
    seconds, saved = time.perf_counter() - start, peak()
    sb.load(out)
    print(json.dumps({
        "bytes": (out / PACKED).stat().st_size, "seconds": seconds, "before_bytes": before,
        "quantize_bytes": quantized - before, "save_bytes": saved - before,
        "peak_bytes": peak() - before, "bits_per_weight": done.bits_per_weight,
        "distance": done.evidence.distance, "agreement": done.agreement,
        "same": n_bytes == (out / PACKED).stat().st_size,
    }))  # fmt: skip


class Told:
    """Says on stderr how far the work is."""

    def note(self, text: str) -> None:
        print(f"{time.strftime('%T')} {peak() / 1e6:.0f} MB {text}", file=sys.stderr)

    def progress(self, step: str, done: int, total: int) -> None:
        pass


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
