"""Folders larger than memory: read from shards, quantized a block at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as reference
from torch import nn

import subbyte as sb
from subbyte.core.spool import Spool
from subbyte.errors import SubbyteError
from subbyte.modules import pack
from subbyte.packing.stored import stored
from subbyte.ptq.evidence.statistics import Statistics
from subbyte.ptq.one_block import BLOCK, Block, HiddenStates, batches_of
from subbyte.ptq.solvers import GPTQ
from subbyte.ptq.steps.chain import Chain, hidden_of
from subbyte.storage import save_pretrained, write_safetensors
from subbyte.storage.digests import sealed, unsealed
from subbyte.storage.pretrained import PACKED, empty_model
from subbyte.storage.shards import INDEX, open_shards

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHARD = 6_000  # bytes
METHOD = sb.CoRa(levels=16, group=8)


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    return saved(llama(), tmp_path / "float")


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def made(request, tmp_path_factory):
    """A network, its folder, and what became of it."""
    net = llama(request.param)
    folder = saved(net, tmp_path_factory.mktemp("made") / "float")
    return net, folder, done_of(folder)


def saved(net, folder):
    net.save_pretrained(folder, max_shard_size=SHARD)
    assert (folder / INDEX).is_file()
    return folder


def calibration(n=12, tokens=8):
    ids = torch.randint(2, 20, (n, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids}]


def done_of(folder, method=METHOD, **changes):
    given = {"calibration": calibration(), "task": "language", **changes}
    return sb.quantize_folder(folder, method, **given)


# ---------------------------------------------------------------- the file, a tensor at a time


def test_a_file_is_what_the_package_safetensors_writes(tmp_path):
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16,
             torch.int32, torch.float32, torch.float64, torch.int64]  # fmt: skip
    tensors = {f"t{i % 3}.{i}": torch.arange(3 + i).to(t) for i, t in enumerate(types)}
    tensors |= {"none": torch.zeros(0), "one": torch.tensor(2.0), "ümlaut": torch.ones(2, 3).T}
    for metadata in ({}, {"a": "b"}):
        path = tmp_path / "file"
        n_bytes = write_safetensors(tensors, metadata, path)
        plain = {name: t.contiguous() for name, t in tensors.items()}
        assert path.read_bytes() == reference(plain, metadata or None)
        assert n_bytes == path.stat().st_size
    write_safetensors(tensors, unsealed(), path)
    assert path.read_bytes() == sealed(reference(plain, unsealed()))


def test_types_that_a_file_has_not_are_named_before_it_is_made(tmp_path):
    with pytest.raises(SubbyteError, match=r"'x' is torch\.complex128"):
        write_safetensors({"x": torch.zeros(1, dtype=torch.complex128)}, {}, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- shards


def test_shards_give_every_tensor_of_the_network(folder):
    shards = open_shards(folder, empty_model(folder))
    wanted = llama().state_dict()
    assert len(set(shards.files.values())) > 2
    for name, value in wanted.items():
        assert torch.equal(shards.read(name), value)


def test_a_base_model_reads_the_files_of_one_with_a_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    shards = open_shards(folder, empty_model(folder))
    assert torch.equal(shards.read("norm.weight"), llama().model.norm.weight)


def missing(folder, files, index):
    files[1].unlink()
    return rf"{files[1].name} is missing"


def cut(folder, files, index):
    files[0].write_bytes(files[0].read_bytes()[:-1])
    return f"{files[0].name}: not a whole safetensors file"


def forgotten(folder, files, index):
    name = next(n for n, file in index["weight_map"].items() if file == files[0].name)
    held = load_file(files[0])
    save_file({n: t for n, t in held.items() if n != name}, files[0])
    return f"promises '{name}' in {files[0].name}"


def twice(folder, files, index):
    held = load_file(files[0])
    name = next(iter(held))
    save_file({**load_file(files[1]), name: held[name]}, files[1])
    return f"both have a tensor '{name}'"


def unlisted(folder, files, index):
    kept = {n: f for n, f in index["weight_map"].items() if f != files[0].name}
    (folder / INDEX).write_text(json.dumps({"weight_map": kept}))
    return "which LlamaForCausalLM needs"


def of_another_shape(folder, files, index):
    held = load_file(files[0])
    name = next(n for n, t in held.items() if t.ndim == 2)
    save_file({**held, name: held[name][:-1].contiguous()}, files[0])
    return f"'{name}' has shape"


def elsewhere(folder, files, index):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../y.safetensors"}}))
    return "expected names of files beside it"


def no_index(folder, files, index):
    (folder / INDEX).write_text("[")
    return f"{INDEX} cannot be read"


@pytest.mark.parametrize(
    "spoil",
    [missing, cut, forgotten, twice, unlisted, of_another_shape, elsewhere, no_index],
    ids=lambda f: f.__name__,
)
def test_shards_that_do_not_fit_are_named_before_the_work(folder, spoil, monkeypatch):
    import subbyte.ptq.by_block as module

    monkeypatch.setattr(module, "quantize", lambda *_, **__: pytest.fail("work started"))
    files = sorted(folder.glob("*.safetensors"))
    says = spoil(folder, files, json.loads((folder / INDEX).read_text()))
    with pytest.raises(SubbyteError, match=says) as caught:
        done_of(folder)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a block after the other


def by_hand(net, done):
    """The blocks quantized one after the other for what the packed ones before hand on, and the
    codes of the head for what reaches it; the table as it is in `done`."""
    table = done.layers["model.embed_tokens"].weight.dequantize()
    ids = calibration()[0]["input_ids"]
    teaching = ids[torch.arange(len(ids)) % 5 != 0]
    twin = llama()
    twin.model.embed_tokens.weight.data = table
    twin.config.use_cache = False
    paths = [f"model.layers.{i}" for i in range(2)]
    chain = Chain(twin, paths, [sb.tasks.base.as_batch({"input_ids": teaching})])
    own, hidden, found = chain.calls[0], chain.hidden[0], {}
    for path in paths:
        block = Block(net.get_submodule(path), own)
        part = sb.quantize(
            block, sb.CoRa(levels=16, group=8, tune=0), calibration=batches_of([hidden]),
            task=HiddenStates(),
        )  # fmt: skip
        packed = pack(part, precision="float32")
        with torch.no_grad():
            hidden = hidden_of(own(packed.get_submodule(BLOCK), hidden))
        found |= {path + name.removeprefix(BLOCK): layer for name, layer in part.layers.items()}
    inputs = twin.model.norm(hidden).flatten(0, 1).double()
    statistics = Statistics((inputs.T @ inputs / len(inputs))[None], len(inputs)).shrunk()
    head = GPTQ().solve(net.lm_head.weight.detach(), statistics.gram, 16, 8)
    return found, head


def test_by_block_is_each_block_quantized_by_hand(made):
    net, _, done = made
    tied = net.config.tie_word_embeddings
    wanted, head = by_hand(net, done)
    own = {name for name in done.layers if ".layers." in name}
    assert own == set(wanted)
    for name, layer in wanted.items():
        assert torch.equal(done.layers[name].weight.codes, layer.weight.codes)
        assert torch.equal(done.layers[name].weight.scale, layer.weight.scale)
    others = {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    if not tied:
        assert torch.equal(done.layers["lm_head"].weight.codes, head.codes)
    assert set(done.layers) - own == others
    packed = pack(done)
    assert torch.equal(packed.model.norm.weight, net.model.norm.weight)
    assert (packed.lm_head.packed is packed.model.embed_tokens.packed) == tied
    plan = sb.Recipe((sb.Rule(method=METHOD),)).plan(net, shared=True)
    assert [x.name for x in done.plan.layers] == [x.name for x in plan.layers]


def test_a_packed_folder_opens_and_computes_the_same(made, tmp_path):
    _, folder, done = made
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    packed = sb.pack(done)
    n_bytes = save_pretrained(packed, folder, tmp_path / "out")
    assert n_bytes == (tmp_path / "out" / PACKED).stat().st_size
    again = sb.load(tmp_path / "out")
    ids = torch.randint(2, 20, (2, 7))
    assert torch.equal(again(ids).logits, packed(ids).logits)
    assert again.config.use_cache
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not any(path.suffix == ".index.json" for path in (tmp_path / "out").iterdir())
    names = {f"{x.name}.weight" for x in done.plan.layers}
    assert {p.name for p in done.parameters if p.levels} == names


def test_the_distance_is_that_of_the_packed_network_from_the_float_one(made):
    net, _, done = made
    ids = calibration()[0]["input_ids"][::5]
    with torch.no_grad():
        wanted = net(ids).logits.double().log_softmax(-1)
        got = sb.pack(done)(ids).logits.double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - got)).sum(-1).mean()
    assert done.evidence.distance == pytest.approx(float(divergence), rel=1e-3, abs=1e-7)


def test_by_block_is_about_as_close_as_the_whole_network(made):
    """At equal bits; errors are not made up for from block to block, which costs a little."""
    net, _, done = made
    whole = sb.quantize(
        net, sb.CoRa(levels=16, group=8, tune=0), calibration=calibration(), task="language"
    )
    assert done.bits_per_weight == whole.bits_per_weight
    assert done.evidence.distance <= 4 * whole.evidence.distance


def test_plans_recipes_and_budgets(folder):
    nearest = sb.CoRa(levels=16, group=8, codes="rtn", tune=0)
    recipe = sb.Recipe((sb.Rule("lm_head"), sb.Rule("*.layers.1.*"), sb.Rule(method=nearest)))
    done = done_of(folder, recipe)
    assert not [name for name in done.layers if ".layers.1." in name or name == "lm_head"]
    packed, net = sb.pack(done), llama()
    assert torch.equal(packed.lm_head.weight, net.lm_head.weight)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(packed.get_submodule(name).weight, net.get_submodule(name).weight)
    again = done_of(folder, nearest, plan=done.plan)
    assert set(again.layers) == set(done.layers)
    for name, layer in done.layers.items():
        assert torch.equal(again.layers[name].weight.codes, layer.weight.codes)


def test_a_table_that_stays_float_and_its_head_are_one(tmp_path):
    net = llama(tied=True)
    rules = (sb.Rule("*embed_tokens"), sb.Rule(method=sb.CoRa(levels=4, codes="rtn")))
    packed = sb.pack(done_of(saved(net, tmp_path / "float"), sb.Recipe(rules)))
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert torch.equal(packed.lm_head.weight, net.lm_head.weight)
    sb.save(packed, tmp_path / "net")
    held = load_file(tmp_path / "net")
    assert [n for n, t in held.items() if t.shape == net.lm_head.weight.shape] == [
        "model.embed_tokens.weight"
    ]


def test_a_budget_is_met_in_each_block(folder):
    rules = (sb.Rule("*.layers.*", method=sb.CoRa(target_bits=6, codes="rtn")), sb.Rule())
    done = done_of(folder, sb.Recipe(rules))
    for block in ("model.layers.0.", "model.layers.1."):
        own = [x for x in done.plan.layers if x.name.startswith(block)]
        bits = 8 * sum(x.n_bytes for x in own) / sum(x.n_weights for x in own)
        assert 4 < bits <= 6
    assert len({x.name for x in done.plan.quantized}) == 14


def test_networks_that_are_no_chain_and_methods_of_the_whole_network_are_refused(tmp_path, folder):
    with pytest.raises(SubbyteError, match="needs the whole network"):
        done_of(folder, sb.PublishedCoRa(bits=4))
    ids = calibration()[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(SubbyteError, match="one length and no padding"):
        done_of(folder, calibration=[{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(SubbyteError, match="one length and no padding"):
        done_of(folder, calibration=[{"input_ids": ids}, {"input_ids": ids[:, :5]}])
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    other = tmp_path / "t5"
    transformers.T5EncoderModel(config).save_pretrained(other)
    with pytest.raises(SubbyteError, match="T5EncoderModel is no chain of blocks"):
        done_of(other, task="embedding")


def test_words_in_a_temporary_file_are_the_words():
    weight = sb.quantize(
        nn.Sequential(nn.Linear(8, 8)), sb.CoRa(levels=5, tune=0), calibration=[torch.randn(20, 8)],
        task="regression",
    ).layers["0"].weight  # fmt: skip
    spool = Spool()
    first, second = (stored(weight, spool.on_disk) for _ in range(2))
    for found in (first, second):
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
        assert found.n_bytes == weight.n_bytes


def test_the_command_quantizes_by_block(folder, capsys, monkeypatch):
    from subbyte.cli import main

    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(18))])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    text, out = folder.parent / "text.txt", folder.parent / "out"
    text.write_text(" ".join(f"w{i * i % 18}" for i in range(200)))

    def ran(*more):
        told = [
            "subbyte", "quantize", folder, "--task", "language", "--calibrate", text, "--method",
            "rtn", "--levels", 16, "--window", 16, "--out", out, "--by-block", "--json", *more,
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", [str(x) for x in told])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    code, said = ran("--tune", 5)
    assert (code, said.err.count("\n")) == (2, 1)
    assert "--tune 5 needs the whole network" in said.err
    code, said = ran()
    assert not code
    assert json.loads(said.out)["bytes"] == (out / PACKED).stat().st_size
    assert sb.load(out)(torch.ones(1, 3, dtype=torch.int64)).logits.isfinite().all()
