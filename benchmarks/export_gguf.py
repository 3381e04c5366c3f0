"""SmolLM2-135M in GGUF at 3 and at 15 levels, read back and compared with the packed weights.

python benchmarks/export_gguf.py FOLDER

FOLDER holds one GGUF file of the model, or a folder of transformers. Weights of Linear layers are
rounded to the nearest level, with one float16 scale per channel; embeddings and norms stay float32.
Appends a JSON line per grid to benchmarks/results/export_gguf.jsonl.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import gguf
import torch
from torch import nn

import subbyte as sb
from subbyte.core.functional import encode, round_scale
from subbyte.core.grids import Grid, PerChannel, ScaleDomain
from subbyte.core.tensors import QuantizedLayer, QuantizedTensor
from subbyte.storage.pretrained import float_model, tokenizer_of

RESULTS = Path(__file__).parent / "results" / "export_gguf.jsonl"


def rounded(w, levels):
    """Nearest levels; the scale brings the largest of 15 levels to the largest weight, and the
    mean of |w| to three quarters of the level of 3."""
    top = levels // 2
    grid = Grid(tuple(float(i) for i in range(-top, top + 1)), PerChannel(0), ScaleDomain.FLOAT16)
    size = w.abs().amax(1) / top if top > 1 else w.abs().mean(1) / 0.75
    scale = round_scale(size, grid.scale_domain)
    return QuantizedLayer(QuantizedTensor(encode(w, scale, grid), scale, grid))


def packed(model, levels):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    made = {n: rounded(model.get_submodule(n).weight.detach(), levels) for n in names}
    return sb.pack(sb.Quantized(model, made))


def compare(net, path):
    """Weights of the packed layers that the file holds to the last bit, and all of them."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, net.config.num_hidden_layers)
    heads = {"q_proj": net.config.num_attention_heads, "k_proj": net.config.num_key_value_heads}
    equal = total = 0
    for name, module in net.named_modules():
        if hasattr(module, "packed"):
            stored = tensors[names.get_name(name) + ".weight"]
            found = gguf.quants.dequantize(stored.data, stored.tensor_type)
            n = heads.get(name.rsplit(".", 1)[1])
            if n:
                found = (
                    found.reshape(n, len(found) // n // 2, 2, -1)
                    .swapaxes(1, 2)
                    .reshape(found.shape)
                )
            wanted = module.weight.numpy()
            equal, total = equal + int((found == wanted).sum()), total + wanted.size
    fields = reader.fields
    tokens = len(fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in fields else 0
    return {"equal": equal, "weights": total, "tokens": tokens, "keys": len(fields)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for levels in (3, 15):
        model = float_model(folder)
        with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
            net = packed(model, levels)
            tokenizer_of(folder).save_pretrained(temporary)
            net.config.name_or_path = temporary  # where the exporter looks for the tokenizer
            start = time.perf_counter()
            done = sb.export(net, Path(temporary) / "net.gguf")
            seconds = time.perf_counter() - start
            kinds = [kind for _, kind in done.layers]
            found = {
                "model": "SmolLM2-135M", "levels": levels,
                "n_bytes": done.n_bytes, "seconds": round(seconds, 1),
                "kinds": {k: kinds.count(k) for k in sorted(set(kinds))},
                "notes": list(done.notes), **compare(net, Path(temporary) / "net.gguf"),
            }  # fmt: skip
        print(json.dumps(found))
        with RESULTS.open("a") as out:
            out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
