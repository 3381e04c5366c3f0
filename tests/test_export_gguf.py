"""GGUF: read back by the package `gguf`, equal to the last bit; and by transformers where it is."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import SubbyteError
from subbyte.core.functional import n_groups, round_scale
from subbyte.core.grids import (
    Grid,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleDomain,
    fixed_point,
    uniform,
)
from subbyte.core.tensors import LowRank, QuantizedLayer, QuantizedTensor
from subbyte.export.gguf_tokens import pre_tokenizer, tokens_of
from subbyte.storage.pretrained import save_pretrained

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

from subbyte.export.gguf import FAST, SMALL, blocks  # noqa: E402

BY_CHANNEL = PerChannel(0)
HALF, TWO = ScaleDomain.FLOAT16, ScaleDomain.POWER_OF_TWO


def weight(grid, shape=(6, 512), rank=0):
    """A packed weight of random codes and scales."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, grid.n_levels, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(n_groups(shape, grid), generator=generator) / 8 + 1e-3
    tensor = QuantizedTensor(codes, round_scale(scale, grid.scale_domain), grid)
    factors = torch.ones(shape[0], rank).half(), torch.ones(rank, shape[1]).half(), torch.ones(rank)
    net = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    made = QuantizedLayer(tensor, None, LowRank(*factors) if rank else None)
    return sb.pack(sb.Quantized(net, {"0": made}))[0].packed


def whole(top, sharing=BY_CHANNEL, domain=HALF):
    return Grid(tuple(float(i) for i in range(-top, top + 1)), sharing, domain)


FITS = [
    (uniform(3, PerChannel(0), HALF), "TQ1_0", "TQ2_0"),
    (uniform(3, PerGroup(256), HALF), "TQ1_0", "TQ2_0"),
    (uniform(3, PerTensor(), TWO), "TQ1_0", "TQ2_0"),
    (uniform(2, PerChannel(0), HALF), "TQ1_0", "TQ2_0"),
    (uniform(3, PerGroup(32), HALF), "Q4_0", "Q4_0"),
    (whole(2), "Q4_0", "Q4_0"),
    (whole(7, PerGroup(64)), "Q4_0", "Q4_0"),
    (fixed_point(4), "Q4_0", "Q4_0"),
    (Grid(tuple(float(i) for i in range(-8, 8)), PerChannel(0), HALF), "Q4_0", "Q4_0"),
    (Grid((-1.5, -0.5, 0.5, 1.5), PerChannel(0), HALF), "Q4_0", "Q4_0"),
    (whole(8), "Q8_0", "Q8_0"),
    (whole(127, PerGroup(32)), "Q8_0", "Q8_0"),
]


@pytest.mark.parametrize(("grid", "small", "fast"), FITS, ids=str)
def test_blocks_read_back_to_the_last_bit(grid, small, fast):
    packed = weight(grid)
    wanted = packed.matrix().decoded().numpy()
    for kinds, name in ((SMALL, small), (FAST, fast)):
        kind, data = blocks("l", packed, kinds)
        assert kind.name == name
        found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
        assert found.dtype == wanted.dtype == np.float32
        assert np.array_equal(found, wanted)
        assert 8 * data.size / wanted.size == kind.bits


REFUSED = [
    (
        weight,
        (uniform(3, PerChannel(0)), (6, 512)),
        r"float16 does not hold.*-1 to 1.*256.*'float16'",
    ),
    (weight, (uniform(15, PerGroup(16), HALF), (6, 512)), r"more than one scale.*-7 to 7"),
    (
        weight,
        (Grid((-1.0, 0.0, 0.7, 1.0), PerChannel(0), HALF), (6, 512)),
        r"not whole numbers.*-2 to 2",
    ),
    (weight, (uniform(3, PerChannel(0), HALF), (6, 40)), r"rows of 40 .*keep the layer in float"),
    (weight, (uniform(3, PerChannel(0), HALF), (6, 512), 2), r"adapter.*max_rank=0"),
]


@pytest.mark.parametrize(
    ("make", "given", "message"), REFUSED, ids=["float32", "groups", "uneven", "rows", "adapter"]
)
def test_what_does_not_fit_names_the_grid_that_does(make, given, message):
    with pytest.raises(SubbyteError, match=f"layer 'model.x'.*{message}") as caught:
        blocks("model.x", make(*given), SMALL)
    assert "\n" not in str(caught.value)


def test_the_grid_that_an_error_names_fits():
    kind, _ = blocks("l", weight(whole(7)), SMALL)
    assert kind.name == "Q4_0"


def test_what_is_no_llama_is_refused(tmp_path):
    with pytest.raises(SubbyteError, match="Llama-form language models"):
        sb.export(weight(whole(1)), tmp_path / "net.gguf")
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_pre_tokenizers():
    data = {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [
        {"id": 1, "content": "<s>", "special": True},
        {"id": 2, "content": "b", "special": False},
    ]}  # fmt: skip
    assert tokens_of(data, 5) == (["a", "<s>", "b", "[PAD3]", "[PAD4]"], [1, 3, 4, 5, 5])
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, {"type": "ByteLevel"}]
    assert pre_tokenizer({"type": "Sequence", "pretokenizers": steps}) == ("smollm", [])
    assert pre_tokenizer({"type": "ByteLevel"}) == ("gpt-2", [])
    name, notes = pre_tokenizer({"type": "Whitespace"})
    assert name == "default"
    assert "Whitespace" in notes[0]


# ---------------------------------------------------------------- whole models of transformers


def reason():
    missing = [n for n in ("transformers", "tokenizers") if importlib.util.find_spec(n) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


needs_transformers = pytest.mark.skipif(reason() is not None, reason=str(reason()))


def folder_of(path, **settings):
    """A folder of a small Llama with a tokenizer of its own."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["hello small world of 123 words, hello"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast) + 2, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0, **settings,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path, fast


def packed_llama(path, domain="float16"):
    import transformers

    net = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain = (sb.Rule("lm_head", method=None), sb.Rule("model.embed_tokens", method=None))
    method = sb.LowRes(levels=3, granularity="channel", scale_domain=domain)
    sb.prepare(net, sb.Recipe((*plain, sb.Rule(method=method))))
    return sb.pack(sb.freeze(net), precision="float32").eval()


def halves_from_neighbours(w, heads):
    """llama.cpp's rows of a projection as transformers has them."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


@needs_transformers
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_read_back(tmp_path, tied):
    path, tokenizer = folder_of(tmp_path / "float", tie_word_embeddings=tied)
    save_pretrained(packed_llama(path), path, tmp_path / "packed")
    net = sb.load(tmp_path / "packed")
    done = sb.export(net, tmp_path / "net.gguf")
    assert done.notes == ()
    reader = gguf.GGUFReader(tmp_path / "net.gguf")
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert ("output.weight" in tensors) is not tied
    for name, heads in (
        ("attn_q", 4),
        ("attn_k", 2),
        ("attn_v", 0),
        ("attn_output", 0),
        ("ffn_down", 0),
    ):
        ours = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
                "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
                "ffn_down": "mlp.down_proj"}[name]  # fmt: skip
        found = tensors[f"blk.1.{name}.weight"]
        found = halves_from_neighbours(found, heads) if heads else found
        wanted = net.get_submodule(f"model.layers.1.{ours}").weight.numpy()
        assert np.array_equal(found, wanted), name
    assert np.array_equal(tensors["output_norm.weight"], net.model.norm.weight.detach().numpy())
    assert np.array_equal(
        tensors["token_embd.weight"], net.model.embed_tokens.weight.detach().numpy()
    )
    fields = {k: f.contents() for k, f in reader.fields.items()}
    settings = {
        "embedding_length": 256, "block_count": 2, "feed_forward_length": 512,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 5000.0,
        "rope.dimension_count": 64,
    }  # fmt: skip
    for key, value in settings.items():
        assert fields[f"llama.{key}"] == value
    assert fields["tokenizer.ggml.pre"] == "smollm"
    vocabulary = {text: number for number, text in enumerate(fields["tokenizer.ggml.tokens"])}
    assert tokenizer.get_vocab().items() <= vocabulary.items()
    merges = json.loads((path / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) for m in merges]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


@needs_transformers
def test_transformers_reads_the_file_and_computes_the_same(tmp_path):
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate alone")
    import transformers

    path, tokenizer = folder_of(tmp_path / "float", tie_word_embeddings=False)
    net = packed_llama(path)
    sb.export(net, tmp_path / "net.gguf", form="fast")
    kind = transformers.LlamaForCausalLM
    again = kind.from_pretrained(tmp_path, gguf_file="net.gguf", dtype=torch.float32).eval()
    for name, module in net.named_modules():
        if hasattr(module, "packed"):
            assert torch.equal(module.weight, again.get_submodule(name).weight), name
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        ours, theirs = net(ids).logits, again(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    found = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="net.gguf")
    assert found("hello 123").input_ids == tokenizer("hello 123").input_ids


@needs_transformers
def test_a_llama_that_does_not_fit_leaves_no_file(tmp_path):
    path, _ = folder_of(tmp_path / "float")
    with pytest.raises(SubbyteError, match=r"layer 'model.layers.0.self_attn.q_proj' does not fit"):
        sb.export(packed_llama(path, "float32"), tmp_path / "net.gguf")
    assert not (tmp_path / "net.gguf").exists()
