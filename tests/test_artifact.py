import json
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import subbyte as sb
from nets import Mixed, mixed_input
from subbyte import LowRes, SubbyteError, storage
from subbyte.core.functional import entropy
from subbyte.models import build
from subbyte.packing import radix

GOLDEN = Path(__file__).parent / "golden"


def packed(model, method=LowRes(levels=5)):  # noqa: B008 - a frozen value
    sb.prepare(model, method)
    return sb.pack(sb.freeze(model))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.safetensors"
    sb.save(packed(Mixed()), path)
    return path


def edit(path, change, tensors_too=None):
    """Rewrite a file with its manifest (and tensors) changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    manifest = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["subbyte"])
    found = storage.read(path)
    tensors = dict(found.tensors)
    manifest.pop("sha256")  # else every change is damage
    change(manifest)
    if tensors_too:
        tensors_too(tensors)
    save_file(tensors, path, {"subbyte": json.dumps(manifest)})


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "method",
    [LowRes(levels=3), LowRes(levels=17, granularity="channel", scale_domain="float16"),
     LowRes(levels=4, granularity="channel", scale_domain="power_of_two")],
    ids=str,
)  # fmt: skip
def test_a_file_gives_the_same_packed_model_back(tmp_path, method, compress):
    net = packed(Mixed(), method)
    n_bytes = sb.save(net, tmp_path / "net.safetensors", compress=compress)
    assert n_bytes == (tmp_path / "net.safetensors").stat().st_size
    again = sb.load(tmp_path / "net.safetensors", model=Mixed())
    state = again.state_dict()
    assert list(state) == list(net.state_dict())
    for name, value in net.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name
    x = mixed_input()
    assert torch.equal(again(*x), net(*x))


def test_a_zoo_network_rebuilds_itself(tmp_path):
    net = packed(build("digitsnet", classes=7))
    sb.save(net, tmp_path / "net.safetensors")
    again = sb.load(tmp_path / "net.safetensors")
    assert again.spec == net.spec
    assert again.preprocess == net.preprocess
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), net(x))


def test_a_bare_layer_is_a_model_too(tmp_path):
    net = packed(nn.Linear(5, 3))
    sb.save(net, tmp_path / "net.safetensors")
    again = sb.load(tmp_path / "net.safetensors", model=nn.Linear(5, 3))
    x = torch.randn(2, 5)
    assert torch.equal(again(x), net(x))


def test_scales_are_stored_in_their_domain(tmp_path):
    for domain, dtype in (("float32", torch.float32), ("float16", torch.float16),
                          ("power_of_two", torch.int8)):  # fmt: skip
        sb.save(packed(nn.Linear(5, 3), LowRes(scale_domain=domain)), tmp_path / "n.safetensors")
        assert storage.read(tmp_path / "n.safetensors").tensors["scale"].dtype == dtype


def big(levels, n_weights=1_000_000):
    """A layer whose codes have the shares of trained weights: a normal distribution, clipped."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(1000, n_weights // 1000)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    return packed(nn.Sequential(layer), LowRes(levels=levels))


@pytest.mark.parametrize("levels", [3, 5])
def test_a_compressed_file_is_within_two_percent_of_the_entropy(tmp_path, levels):
    net = big(levels, 100_000)
    sb.save(net, tmp_path / "n.safetensors", compress=True)
    stored = storage.read(tmp_path / "n.safetensors").tensors["0.codes"].numel()
    codes = net[0].packed.codes()
    assert 8 * stored / codes.numel() <= 1.02 * entropy(codes, levels)


def test_the_manifest_is_under_one_percent_of_a_megabyte(tmp_path):
    net = packed(build("resnet56"))
    total = sb.save(net, tmp_path / "n.safetensors")
    tensors = storage.read(tmp_path / "n.safetensors").tensors
    overhead = total - sum(t.numel() * t.element_size() for t in tensors.values())
    print(f"resnet56: {overhead} of {total} bytes")
    net = big(5, 4_000_000)
    total = sb.save(net, tmp_path / "n.safetensors")
    tensors = storage.read(tmp_path / "n.safetensors").tensors
    overhead = total - sum(t.numel() * t.element_size() for t in tensors.values())
    assert total > 1_000_000
    assert overhead <= 0.01 * total


def test_incompressible_codes_stay_in_words(tmp_path):
    layer = nn.Linear(1000, 100)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
    sb.save(packed(layer, LowRes(levels=16, beta=2.0)), tmp_path / "n.safetensors", compress=True)
    assert storage.read(tmp_path / "n.safetensors").entries[""].encoding == storage.WORDS


# ------------------------------------------------------------ hostile and broken files


def test_every_truncation_is_refused(file):
    data = file.read_bytes()
    for keep in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:keep])
        with pytest.raises(SubbyteError, match=r"not a whole safetensors file.*make or fetch"):
            sb.load(file, model=Mixed())


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(SubbyteError, match=r"gone\.safetensors: no such file"):
        sb.load(tmp_path / "gone.safetensors")
    with pytest.raises(SubbyteError, match=r"is a folder and has no subbyte\.safetensors"):
        sb.load(tmp_path)


def test_float_weights_are_no_packed_file(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(SubbyteError, match=r"without a subbyte manifest.*--weights"):
        sb.load(tmp_path / "w.safetensors")


def set_key(*path, value):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_key("version", value=3), "format version 3, this subbyte reads up to 2; upgrade"),
        (set_key("version", value="x"), "version 'x'"),
        (lambda m: m.pop("grids"), "malformed.*grids"),
        (set_key("layers", "conv", "grid", value=9), "grid 9"),
        (set_key("layers", "conv", "grid", value=-1), "grid -1"),
        (set_key("layers", "conv", "encoding", value="lzma"), "encoding 'lzma'"),
        (set_key("layers", "conv", "shape", value=[8, 3, 3, -3]), "shape"),
        (set_key("layers", "conv", "shape", value=[2**32, 2**32]), "has a shape"),
        (set_key("layers", "conv", "shape", value=[2**70]), "has a shape"),
        (set_key("layers", "conv", "shape", value="ab"), "has a shape"),
        (set_key("layers", "conv", "type", value="Linear"), "layer 'conv' is Linear.*Conv2d"),
        (set_key("version", value=True), "version True"),
        (set_key("format", value="zzz"), "format 'zzz'"),
        (set_key("layers", "conv", "bias", value="no"), "bias 'no'"),
        (set_key("grids", 0, "levels", value=[-1e40, 0.0, 1e40]), "not all finite in float32"),
        (set_key("grids", 0, "levels", value=[0.0, 5e-324, 1e-323]), "increase in float32"),
        (set_key("grids", 0, "levels", value=[-1, 0, 10**400]), "not a grid"),
        (set_key("grids", 0, "levels", value="12345"), "not a grid"),
        (set_key("version", value=json.loads("[" * 60 + "]" * 60)), "version"),
        (set_key("layers", "conv", "shape", value=[8, 3, 9, 1]), r"Conv2d \(8, 3, 9, 1\)"),
        (lambda m: m["layers"].pop("conv"), "does not account for every tensor"),
        (set_key("grids", 0, "levels", value=[0.0, 0.0]), "do not strictly increase"),
        (set_key("grids", 0, "channel_axis", value=7), "layer 'conv'.*channel axis 7"),
        (set_key("grids", 0, "scale_domain", value="float16"), "scale is torch.float32"),
        (set_key("grids", 0, "levels", value=[-1, 0, 1]), "layer 'conv': 216 codes of 3 levels"),
        (set_key("layers", "conv", "encoding", value="radix-bytes+zstd"), "codes are damaged"),
        (lambda m: m["state"].append("more"), "'more' is in the manifest but not in the file"),
    ],
)  # fmt: skip
def test_a_manifest_that_lies_is_refused(file, change, says):
    edit(file, change)
    with pytest.raises(SubbyteError, match=f"{file.name}: .*{says}"):
        sb.load(file, model=Mixed())


def test_a_code_above_the_grid_names_the_layer(file):
    edit(
        file,
        lambda m: None,
        lambda t: t.update({"conv.codes": torch.full_like(t["conv.codes"], 255)}),
    )
    with pytest.raises(SubbyteError, match=r"layer 'conv': .*code above the grid"):
        sb.load(file, model=Mixed())


def test_a_scale_that_is_not_finite_names_the_layer(file):
    edit(file, lambda m: None, lambda t: t.update({"up.scale": torch.tensor([float("nan")])}))
    with pytest.raises(SubbyteError, match="layer 'up': scale has NaN"):
        sb.load(file, model=Mixed())


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("conv.bias", torch.zeros(9), r"'conv' has bias \(8,\), its codes come with \(9,\)"),
        ("conv.bias", torch.zeros(8, dtype=torch.int64), "'conv': the bias is torch.int64"),
        ("norm.weight", torch.ones(8, dtype=torch.int32), r"'norm.weight' is torch.int32 in the"),
        ("up.scale", torch.tensor([-1.0]), "layer 'up': scale has negative values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(file, name, tensor, says):
    edit(file, lambda m: None, lambda t: t.update({name: tensor}))
    with pytest.raises(SubbyteError, match=says):
        sb.load(file, model=Mixed())


@pytest.mark.parametrize(
    "network",
    [{"name": ["x"], "arguments": {}}, {"name": 5, "arguments": {}}, "cvnn1", {"name": "cvnn1"},
     {"name": "digitsnet", "arguments": {"classes": 10**13}},
     {"name": "digitsnet", "arguments": {"classes": "many"}}],
)  # fmt: skip
def test_a_network_entry_that_lies_is_refused(file, network):
    edit(file, set_key("network", value=network))
    with pytest.raises(SubbyteError, match=f"{file.name}: "):
        sb.load(file)


def test_an_exponent_below_the_domain_is_refused(tmp_path):
    path = tmp_path / "n.safetensors"
    sb.save(packed(nn.Sequential(nn.Linear(3, 3)), LowRes(scale_domain="power_of_two")), path)
    edit(path, lambda m: None, lambda t: t.update({"0.scale": torch.tensor([-127]).to(torch.int8)}))
    with pytest.raises(SubbyteError, match="exponent -127 is below -126"):
        sb.load(path, model=nn.Sequential(nn.Linear(3, 3)))


def test_tensors_of_a_wrong_size_are_named(file):
    edit(file, lambda m: None, lambda t: t.update({"norm.weight": torch.zeros(9)}))
    with pytest.raises(SubbyteError, match=r"'norm.weight' has shape \(9,\) in the file, \(8,\)"):
        sb.load(file, model=Mixed())


def test_another_network_is_refused(file):
    with pytest.raises(SubbyteError, match=r"no layer 'conv'; it has 0"):
        sb.load(file, model=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(
        SubbyteError,
        match=r"neither a zoo network nor a program; pass yours: load\(path, model=net\)",
    ):
        sb.load(file)

    class More(Mixed):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.raises(SubbyteError, match=r"the file has no 'extra\.bias'"):
        sb.load(file, model=More())


def test_a_float_state_that_is_not_finite_is_not_saved(tmp_path):
    net = packed(Mixed())
    net.norm.running_mean[2] = float("nan")
    with pytest.raises(SubbyteError, match=r"'norm\.running_mean' has NaN"):
        sb.save(net, tmp_path / "n.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["norm.weight", "norm.running_mean", "conv.bias", "head.bias"])
def test_values_that_no_network_holds_are_refused_at_load(file, name, value):
    edit(file, lambda _: None, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(SubbyteError, match=f"'{name}' has NaN or infinite values"):
        sb.load(file, model=Mixed())


def test_a_negative_variance_is_refused_at_load_and_at_save(file, tmp_path):
    edit(file, lambda _: None, lambda tensors: tensors["norm.running_var"][:1].fill_(-1.0))
    with pytest.raises(SubbyteError, match=r"'norm\.running_var' is a variance and has negative"):
        sb.load(file, model=Mixed())
    net = packed(Mixed())
    net.norm.running_var[0] = -1
    with pytest.raises(SubbyteError, match="negative values; nothing was saved"):
        sb.save(net, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("ties", [{"a": "b"}, {"norm.bias": "norm.weight"}, {"x": "y" * 10**6}, 3])
def test_ties_that_lie_are_refused(file, ties):
    edit(file, lambda manifest: manifest.update(ties=ties))
    with pytest.raises(SubbyteError) as error:
        sb.load(file, model=Mixed())
    assert len(str(error.value)) < 600


def test_state_keeps_the_dtype_of_the_file(file):
    for like in (Mixed().half(), Mixed().to("meta")):
        net = sb.load(file, model=like)
        assert net.norm.weight.dtype == torch.float32
        assert net(*mixed_input()).isfinite().all()


def test_save_refuses_a_model_without_packed_layers(tmp_path):
    with pytest.raises(SubbyteError, match="no packed layer"):
        sb.save(Mixed(), tmp_path / "n.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("domain", ["float32", "float16", "power_of_two"])
def test_a_model_that_was_cast_without_loss_is_saved(tmp_path, domain):
    net = packed(nn.Sequential(nn.Linear(3, 3)), LowRes(scale_domain=domain))
    sb.save(net.double().float(), tmp_path / "n.safetensors")
    again = sb.load(tmp_path / "n.safetensors", model=nn.Sequential(nn.Linear(3, 3)))
    assert torch.equal(again[0].packed(), net[0].packed())


def test_a_disk_that_fills_leaves_the_old_file(tmp_path):
    path = tmp_path / "n.safetensors"
    sb.save(packed(nn.Sequential(nn.Linear(4, 4))), path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a real write error
    try:
        with pytest.raises(SubbyteError, match=r"cannot write .*File too large.*untouched"):
            sb.save(big(5, 1_000_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "n.safetensors"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SubbyteError, match=r"No space left on device.*Free some space"):
        sb.save(packed(nn.Sequential(nn.Linear(4, 4))), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SubbyteError, match="cannot write"):
        sb.save(packed(nn.Sequential(nn.Linear(4, 4))), tmp_path / "file" / "n.safetensors")


def test_words_in_the_file_are_those_of_the_specification(tmp_path):
    """A reader written from docs/format.md alone."""
    net = packed(nn.Sequential(nn.Linear(9, 5)), LowRes(levels=5, granularity="channel"))
    sb.save(net, tmp_path / "n.safetensors")
    data = (tmp_path / "n.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["subbyte"])
    entry = manifest["layers"]["0"]
    grid = manifest["grids"][entry["grid"]]

    def tensor(name):
        begin, end = header[name]["data_offsets"]
        return data[8 + length + begin : 8 + length + end]

    raw = tensor("0.codes")
    words = struct.unpack(f"<{len(raw) // 8}Q", raw)
    digits = [word // 5**k % 5 for word in words for k in range(27)][:45]
    scales = struct.unpack("<5f", tensor("0.scale"))
    values = [grid["levels"][d] * scales[i // 9] for i, d in enumerate(digits)]
    assert torch.allclose(net[0].packed().flatten(), torch.tensor(values), rtol=1e-6, atol=0)
    assert grid["channel_axis"] == 0
    assert radix.digits_per(5, 64) == 27


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_golden_files_of_every_version_load(path):
    expected = json.loads(path.with_suffix(".json").read_text())
    layers = storage.read(path).layers()
    assert set(layers) == set(expected)
    for name, layer in layers.items():
        assert layer.weight.codes.flatten().tolist() == expected[name]["codes"]
        assert layer.weight.scale.tolist() == expected[name]["scale"]
        assert layer.bias.tolist() == expected[name]["bias"]
    like = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(300, 4))
    assert sb.load(path, model=like)(torch.randn(2, 2, 12, 12)).isfinite().all()
    encodings = {entry.encoding for entry in storage.read(path).entries.values()}
    assert (storage.ZSTD in encodings) == ("zstd" in path.stem)


def test_a_buffer_that_no_file_holds_is_not_left_without_values(tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("angles", torch.ones(4), persistent=False)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x * self.angles)

    sb.save(packed(Turned()), tmp_path / "net.safetensors")
    with torch.device("meta"):
        like = Turned()
    with pytest.raises(SubbyteError, match=r"buffer 'angles'.*meta device.*in memory"):
        sb.load(tmp_path / "net.safetensors", model=like)
