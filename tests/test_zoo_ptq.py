"""Networks of transformers and timm, small and of random weights, through `quantize` and a file.

Skipped where a package is not installed.
"""

import struct

import pytest
import torch

import subbyte as sb
from test_program_zoos import (
    GPT2,
    IMAGE,
    LLAMA,
    T5,
    TEXT,
    TIMM,
    equal,
    model_of,
    pixels,
    timm_net,
)  # fmt: skip

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

BATCHES, BATCH = 3, 4


def tokens(n):
    return {"input_ids": torch.randint(1, 50, (n, 7))}


def pairs(n):
    return {**tokens(n), "decoder_input_ids": torch.randint(1, 50, (n, 4))}


def sounds(n):
    return {
        "input_features": torch.randn(n, 8, 40),
        "decoder_input_ids": torch.randint(1, 50, (n, 4)),
    }


MIXTRAL = {**LLAMA, "num_local_experts": 4}
GPT_OSS = {**MIXTRAL, "head_dim": 8, "num_experts_per_tok": 2, "sliding_window": 4}
QWEN3_MOE = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WHISPER = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
           "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20,
           "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1}  # fmt: skip
WAV2VEC2 = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "conv_dim": (8, 8), "conv_stride": (5, 2),
            "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2}  # fmt: skip

NETWORKS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, tokens),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, tokens),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL, tokens),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS, tokens),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE, tokens),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, tokens),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, pairs),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, sounds),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, pixels(32)),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2,
                 lambda n: {"input_values": torch.randn(n, 400)}),
}  # fmt: skip
SMALL = {"channels": (8, 16, 32, 64)}  # or its widest layers take minutes to solve
OF_TIMM = {**TIMM, "resnet18": SMALL, "regnetx_002": {}}
KEPT = {  # parameters of two or more dimensions that stay float, by the end of their names
    "mixtral": ("mlp.gate.weight",),  # the routers
    "gpt_oss": ("mlp.router.weight", "down_proj_bias"),
    "qwen3_moe": ("mlp.gate.weight",),
    "whisper": ("decoder.embed_positions.weight",),
    "vit": ("cls_token", "position_embeddings"),
}


def made(name):
    model, config, settings, _ = NETWORKS[name]
    return model_of(model, config, **settings).eval()


def outputs(net, given):
    """Its tensors; a cache of keys is an object of its own."""
    found = {key: y for key, y in net(**given).items() if isinstance(y, torch.Tensor)}
    assert "logits" in found
    return found


def quantized(net, inputs):
    batches = [inputs(BATCH) for _ in range(BATCHES)]
    return sb.quantize(net, sb.CoRa(levels=16, tune=0), calibration=batches)


def check_account(done, net, path):
    """Every value of a parameter is in the account once, and its bytes are the file's to 1 %."""
    tied = sum(p.numel() for p in net.parameters())
    assert sum(p.n_values for p in done.parameters) == tied
    named = [p.name for p in done.parameters]
    assert len(set(named)) == len(named)
    assert all(p.levels or p.reason for p in done.parameters)
    with path.open("rb") as file:
        header = 8 + struct.unpack("<Q", file.read(8))[0]
    own = {name for name, _ in done.model.named_parameters(remove_duplicate=False)}
    state = done.model.state_dict().items()
    buffers = sum(value.nbytes for name, value in state if name not in own)
    stored = path.stat().st_size - header - buffers
    assert done.bits_per_weight == pytest.approx(8 * stored / tied, rel=0.01)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    net, inputs, path = made(name), NETWORKS[name][3], tmp_path / "net.safetensors"
    done = quantized(net, inputs)
    packed = sb.pack(done)
    sb.save(packed, path)
    opened = sb.load(path, made(name))
    with torch.no_grad():
        for n in (1, 3):
            given = inputs(n)
            assert equal(outputs(packed, given), outputs(opened, given)), f"batch of {n}"
    if name != "wav2vec2":  # whose weight norm has 8 parameters more than the weight it computes
        check_account(done, net, path)
    kept = [p.name for p in done.parameters if not p.levels and "vector" not in p.reason]
    assert all(own.endswith(KEPT.get(name, ())) for own in kept), kept
    notes = "\n".join(done.notes)
    assert all(f"'{own}'" in notes for own in kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TIMM)
def test_networks_of_timm(name, tmp_path):
    torch.manual_seed(0)
    net, path = timm_net(name, **OF_TIMM[name]).eval(), tmp_path / "net.safetensors"
    done = quantized(net, lambda n: torch.randn(n, 3, 32, 32))
    packed = sb.pack(done)
    sb.save(packed, path)
    opened = sb.load(path, timm_net(name, **OF_TIMM[name]))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(packed(x), opened(x))
    check_account(done, net, path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generate_gives_the_same_tokens_before_and_after_saving(name, tmp_path):
    torch.manual_seed(0)
    packed = sb.pack(quantized(made(name), tokens))
    sb.save(packed, tmp_path / "net.safetensors")
    opened = sb.load(tmp_path / "net.safetensors", made(name))
    given = {**tokens(2), "attention_mask": torch.ones(2, 7).long()}
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = packed.generate(**given, **how)
    assert found.shape[1] > 7
    assert torch.equal(found, opened.generate(**given, **how))
