"""Folders of transformers: quantized, packed, opened again; skipped where it is not installed."""

import json

import pytest
import torch

import subbyte as sb
from subbyte.commands.pretrained import (
    FolderRequest,
    convert_folder,
    evaluate_folder,
    sentences,
    table,
    windows,
)
from subbyte.errors import SubbyteError
from subbyte.storage.pretrained import PACKED, float_model, is_folder

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

WORDS = [f"w{i}" for i in range(18)]


def text(n=4000, seed=0):
    index = torch.randint(len(WORDS), (n,), generator=torch.Generator().manual_seed(seed))
    words = [WORDS[i] for i in index.tolist()]
    return "\n".join(" ".join(words[i : i + 9]) for i in range(0, n, 9))


def tokenizer():
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    )


def llama():
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.BertModel(config)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(text())
    return tmp_path / "float"


def request(folder, **changes):
    given = {"task": "language", "window": 32, "samples": 12, **changes}
    return FolderRequest(
        folder, calibrate=folder.parent / "text.txt", out=folder.parent / "packed", **given
    )


def test_a_language_model_goes_through_and_generates_the_same(folder):
    result = convert_folder(request(folder), sb.CoRa(levels=16, group=8, tune=3))
    out = result.folder
    assert is_folder(out)
    names = {path.name for path in out.iterdir()}
    assert {PACKED, "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "model.safetensors" not in names
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    packed = sb.pack(result.quantized)
    again = sb.load(out)
    assert type(again) is transformers.LlamaForCausalLM
    assert again.lm_head.packed is again.model.embed_tokens.packed
    ids = torch.randint(2, 20, (2, 7))
    assert torch.equal(again(ids).logits, packed(ids).logits)
    made = [
        net.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        for net in (packed, again)
    ]  # fmt: skip
    assert torch.equal(*made)
    assert again.config.use_cache
    pipe = transformers.pipeline("text-generation", model=again, tokenizer=tokenizer())
    assert pipe("w1 w2", max_new_tokens=3)[0]["generated_text"].startswith("w1 w2")
    # Bits of the whole network against the file, whose manifest and header are not weights.
    n_bytes = result.quantized.bits_per_weight * sum(p.numel() for p in llama().parameters()) / 8
    assert n_bytes <= (out / PACKED).stat().st_size <= n_bytes + 16_000
    assert "peak memory" in [str(c.header) for c in table(result).columns]
    assert json.dumps(result.to_dict())


def test_perplexity_of_folders_is_that_of_the_definition(folder):
    path = folder.parent / "text.txt"
    got = evaluate_folder(folder, path, "language", window=32, limit=5)
    tokens = windows(path.read_text(), tokenizer(), 32)
    chosen = tokens[torch.linspace(0, len(tokens) - 1, 5).long()]
    with torch.no_grad():
        logits = float_model(folder)(chosen).logits[:, :-1].double().log_softmax(-1)
    nats = -logits.gather(2, chosen[:, 1:, None]).mean()
    assert got.value == pytest.approx(float(nats.exp()), rel=1e-5)
    assert got.n == 5 * 31
    result = convert_folder(request(folder), sb.CoRa(levels=256, tune=0))
    near = evaluate_folder(result.folder, path, "language", window=32, limit=5, precision="float32")
    assert near.value == pytest.approx(got.value, rel=1e-2)


def test_a_sentence_encoder_goes_through(folder):
    torch.manual_seed(0)
    other = folder.parent / "bert"
    bert().save_pretrained(other)
    tokenizer().save_pretrained(other)
    result = convert_folder(
        request(other, task="embedding", samples=60), sb.CoRa(levels=16, tune=3)
    )
    assert result.evidence.task == "embedding"
    batch = next(sentences(text().splitlines(), tokenizer(), 5, 0))
    packed, again = sb.pack(result.quantized), sb.load(result.folder)
    assert torch.equal(again(**batch).last_hidden_state, packed(**batch).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "vision"}, "--task vision: a folder and a text are for language or embedding"),
        ({"window": 10**6}, "fewer than one window of 1000000"),
        ({"window": 1}, "window=1; give 2"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_bad_requests_are_named_before_the_work(folder, changes, says, monkeypatch):
    import subbyte.commands.pretrained as module

    monkeypatch.setattr(module, "quantize", lambda *_, **__: pytest.fail("work started"))
    with pytest.raises(SubbyteError, match=says):
        convert_folder(request(folder, **changes), sb.CoRa(levels=4))
    assert not (folder.parent / "packed" / PACKED).exists()


def test_folders_that_cannot_be_opened_say_why(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SubbyteError, match=r"has no weights; expected model\.safetensors"):
        float_model(folder)
    with pytest.raises(SubbyteError, match=r"and has no subbyte\.safetensors; make it with"):
        sb.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SubbyteError, match="none of which transformers"):
        float_model(folder)
    with pytest.raises(SubbyteError, match="is a folder, whose config says"):
        sb.load(folder, torch.nn.Linear(2, 2))


def test_the_float_folder_is_never_written_to(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    from subbyte.storage.pretrained import save_pretrained

    result = convert_folder(request(folder), sb.CoRa(levels=4, tune=0))
    with pytest.raises(SubbyteError, match="is the folder of the float model"):
        save_pretrained(sb.pack(result.quantized), folder, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_line_takes_folders(folder, capsys, monkeypatch):
    from subbyte.cli import app, main

    def ran(*arguments):
        monkeypatch.setattr("sys.argv", ["subbyte", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    assert app
    path, out = folder.parent / "text.txt", folder.parent / "packed"
    code, said = ran("quantize", folder, "--task", "language", "--calibrate", path, "--levels", 16,
                     "--group", 8, "--window", 32, "--samples", 8, "--tune", 0, "--out", out,
                     "--json")  # fmt: skip
    assert not code
    assert json.loads(said.out)["task"] == "language"
    code, said = ran("evaluate", out, "--task", "language", "--data", path, "--window", 32,
                     "--limit", 4)  # fmt: skip
    assert not code
    assert "perplexity" in said.out
    for arguments, says in (
        (("quantize", folder, "--calibrate", path, "--levels", 4, "--out", out), "needs --task"),
        (("evaluate", out, "--data", path), "needs --task"),
        (("evaluate", out, "--task", "embedding", "--data", path), "has no score on a plain text"),
        (("evaluate", "lenet5", "--task", "language", "--data", "digits"), "--task goes with"),
        (("quantize", folder, "--task", "language", "--calibrate", path, "--levels", 4, "--size", 8,
          "--out", out), "--size does not go with"),
        (("quantize", folder, "--task", "language", "--calibrate", path.parent / "none", "--levels",
          4, "--out", out), "cannot be read"),
    ):  # fmt: skip
        code, said = ran(*arguments)
        assert code == 2
        assert says in said.err
        assert said.err.count("\n") == 1
