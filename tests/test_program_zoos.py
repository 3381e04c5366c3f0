"""Networks of transformers and timm, small and of random weights: a file opens without them.

Skipped where a package is not installed; what they taught is tested without them at the end.
"""

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import subbyte as sb
from subbyte import SubbyteError
from subbyte.graph.trace import trace

pytest.importorskip("subbyte._native", reason="the C++ core was not built")


@functools.cache
def timm():
    try:
        return pytest.importorskip("timm")
    except RuntimeError:  # a torchvision of another torch: timm needs the names of two operators
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        timm.library = library  # which forgets its operators when it goes
        return pytest.importorskip("timm")


def model_of(name, config, **settings):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**settings))


def timm_net(name, **settings):
    return timm().create_model(name, pretrained=False, num_classes=5, **settings)


def tokens(n):
    mask = torch.cat([torch.ones(n, 5), torch.randint(0, 2, (n, 2))], 1).long()
    return {"input_ids": torch.randint(1, 50, (n, 7)), "attention_mask": mask}


def pixels(size, name="pixel_values"):
    return lambda n: {name: torch.randn(n, 3, size, size)}


TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip
DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
          "max_position_embeddings": 32}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}  # fmt: skip
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "image_size": 32, "patch_size": 8}  # fmt: skip
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SEGFORMER = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
LLAMA = {**TEXT, "num_key_value_heads": 1, "use_cache": False}

TRANSFORMERS = {
    "bert": ("BertModel", "BertConfig", TEXT, tokens),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTIL, tokens),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, tokens),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, tokens),
    "t5": ("T5EncoderModel", "T5Config", T5, tokens),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, pixels(32)),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGES, pixels(32)),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, pixels(64)),
}
TIMM = {
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24},
}


def packed(net):
    """It with statistics of its own in every norm, packed."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    sb.prepare(net.eval(), sb.LowRes(levels=5))
    return sb.pack(sb.freeze(net))


def plain(value):
    """Objects of a network's own as the dicts and lists that a program returns."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def equal(a, b):
    (a, how), (b, other) = (pytree.tree_flatten(plain(value)) for value in (a, b))
    return how == other and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(net, inputs, path):
    """What the file opens as equals the network to the bit, for the example's batch and others."""
    sb.save(net, path, example=inputs(2))
    opened = sb.load(path)
    assert set(net.state_dict()) <= set(opened.state_dict())
    with torch.no_grad():
        for n in (2, 3, 1):
            given = inputs(n)
            assert equal(net(**given), opened(**given)), f"batch of {n}"


@pytest.mark.filterwarnings("error:saved without a program")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_networks_of_transformers_open_without_their_class(name, tmp_path):
    torch.manual_seed(0)
    model, config, settings, inputs = TRANSFORMERS[name]
    net = packed(model_of(model, config, **settings))
    check(net, inputs, tmp_path / "net.safetensors")


@pytest.mark.slow
@pytest.mark.filterwarnings("error:saved without a program")
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_open_without_their_class(name, tmp_path):
    torch.manual_seed(0)
    net = packed(timm_net(name, **TIMM[name]))
    check(net, pixels(32, "x"), tmp_path / "net.safetensors")


OPEN = """
import sys, torch, subbyte as sb
given, wanted = torch.load(sys.argv[2])
found = sb.load(sys.argv[1])(**given)
assert "transformers" not in sys.modules
assert found.keys() == wanted.keys()
assert all(torch.equal(found[key], wanted[key]) for key in wanted)
"""


@pytest.mark.slow
def test_a_fresh_process_opens_bert_without_transformers(tmp_path):
    torch.manual_seed(0)
    model, config, settings, inputs = TRANSFORMERS["bert"]
    net, given = packed(model_of(model, config, **settings)), inputs(3)
    sb.save(net, tmp_path / "net.safetensors", example=inputs(2))
    with torch.no_grad():
        torch.save((given, plain(net(**given))), tmp_path / "data.pt")
    code = [sys.executable, "-c", OPEN, str(tmp_path / "net.safetensors")]
    done = subprocess.run([*code, str(tmp_path / "data.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------- without the packages


class BatchNorm2d(nn.BatchNorm2d):
    """A norm with its activation inside, as timm has it; its name is torch's."""

    def forward(self, x):
        return super().forward(x).relu()


class Net(nn.Module):
    """A norm of its own class, a tied tensor, a parameter that forward never reads, a mask."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), BatchNorm2d(5)
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.unread = nn.Parameter(torch.randn(2))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        z = self.second(self.first(y))
        keep = (y > 0) & (z > -1) | (z < -2)
        return z.masked_fill(~keep, torch.finfo(z.dtype).min)


def inputs(n):
    return {"x": torch.randn(n, 3, 6, 6)}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return packed(Net())


def test_subclasses_of_norms_ties_and_what_is_not_read(net, tmp_path):
    path, again = tmp_path / "net.safetensors", tmp_path / "again.safetensors"
    check(net, inputs, path)
    opened = sb.load(path)
    assert opened.second.weight is opened.first.weight
    assert torch.equal(opened.unread, net.unread)
    sb.save(opened, again)  # and a file made of that has it all
    assert again.stat().st_size == path.stat().st_size


def test_a_batchnorm_of_its_own_class_is_traced_inside(net):
    operators = [node.op for node in trace(net, inputs(2)["x"]).nodes]
    assert "BatchNormalization" in operators
    assert "Relu" in operators


def test_absorbing_a_batchnorm_of_its_own_class_is_refused(net):
    prepared = Net()
    sb.prepare(prepared, sb.LowRes(levels=5))
    with pytest.raises(SubbyteError, match="'norm' is a BatchNorm2d with a forward of its own"):
        sb.pack(sb.freeze(prepared), batchnorm="absorb")


def test_loaded_tensors_lie_as_torch_places_its_own(net, tmp_path):
    """Or float products of a loaded network differ in the last bit."""
    sb.save(net, tmp_path / "net.safetensors", example=inputs(2))
    for opened in (
        sb.load(tmp_path / "net.safetensors"),
        sb.load(tmp_path / "net.safetensors", Net()),
    ):
        assert all(value.data_ptr() % 64 == 0 for value in opened.norm.state_dict().values())
