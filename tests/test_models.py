"""The reference networks: sizes, rebuilding, weights, preprocessing, published accuracies."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subbyte.data import batches, load_images
from subbyte.errors import SubbyteError
from subbyte.models import NETWORKS, Preprocess, build, glorot_, load_weights
from subbyte.models.mobilenet import _pad_same
from subbyte.models.resnet import Block

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")

PARAMETERS = {
    "fcnn1": 1_707_274,
    "fcnn2": 8_921_610,
    "cvnn1": 551_146,
    "cvnn2": 4_940_458,
    "vit1": 571_210,
    "vit2": 4_770_570,
    "lenet5": 582_634,
    "vgg7": 12_979_082,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "squeezenet11": 1_235_496,
    "mobilenetv1": 2_585_560,
    "digitsnet": 89_722,
}
SMALL = {"squeezenet11": {"image_size": 67}, "mobilenetv1": {"image_size": 65, "width": 0.25}}
OURS = ["fcnn1", "fcnn2", "cvnn1", "cvnn2", "vit1", "vit2", "lenet5", "vgg7", "digitsnet"]


def images_for(net, n=2):
    size = net.preprocess.size or (32, 32)
    generator = torch.Generator().manual_seed(0)
    shape = (n, len(net.preprocess.mean), *size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def macs(net, x):
    """Multiply-adds of the convolutions and linear layers for one image."""
    total = 0

    def count(layer, _, y):
        nonlocal total
        positions = y[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        total += layer.weight.numel() * positions

    hooks = [
        layer.register_forward_hook(count)
        for layer in net.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    net.eval()(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count(name):
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "expected"), [("cvnn1", 38_896_896), ("cvnn2", 344_755_968)])
def test_forward_cost(name, expected):
    assert macs(build(name), torch.zeros(1, 3, 32, 32)) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_spec_survives_json_and_builds_the_same_network(name):
    net = build(name, classes=7, **SMALL.get(name, {}))
    twin = build(net.spec.name, **json.loads(json.dumps(net.spec.arguments)))
    twin.load_state_dict(net.state_dict())
    images = images_for(net)
    assert twin.spec == net.spec
    assert twin.preprocess == net.preprocess
    assert net.classes == twin.classes == 7
    with torch.no_grad():
        y, y_twin = net.eval()(net.preprocess(images)), twin.eval()(twin.preprocess(images))
    assert y.shape == (2, 7)
    assert y.isfinite().all()
    assert torch.equal(y, y_twin)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    net = build(name, **SMALL.get(name, {})).train()
    images = images_for(net, n=4)
    loss = nn.functional.cross_entropy(net(net.preprocess(images)), torch.arange(4) % 10)
    loss.backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", OURS)
def test_our_networks_take_other_images(name):
    net = build(name, in_channels=1, image_size=28, classes=3).eval()
    assert net(net.preprocess(images_for(net))).shape == (2, 3)


def test_lenet_on_16_pixels_is_the_smallest():
    assert build("lenet5", image_size=16).eval()(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    with pytest.raises(SubbyteError, match=r"image_size=15 .*'lenet5'.*use 16 or more"):
        build("lenet5", image_size=15)


def test_vit_depends_on_the_place_of_a_patch():
    net = build("vit1").eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = torch.cat([x[..., 4:], x[..., :4]], dim=-1)
    assert (net(x) - net(moved)).abs().max() > 1e-4


def test_glorot_bounds():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4)
    net = nn.ModuleDict(
        {"attention": attention, "linear": nn.Linear(100, 300), "conv": nn.Conv2d(8, 16, 5)}
    )
    for bias in (attention.in_proj_bias, net["linear"].bias, net["conv"].bias):
        nn.init.ones_(bias)
    glorot_(net)
    weights = [(q, 128) for q in attention.in_proj_weight.chunk(3)]
    weights += [(attention.out_proj.weight, 128), (net["linear"].weight, 400)]
    weights += [(net["conv"].weight, (8 + 16) * 25)]
    for weight, fans in weights:
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
    for bias in (attention.in_proj_bias, net["linear"].bias, net["conv"].bias):
        assert not bias.any()


def test_preprocess_matches_a_loop_in_float64():
    images = torch.randint(0, 256, (2, 3, 7, 9), dtype=torch.uint8)
    x = Preprocess((4, 6), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), scale=200.0, bgr=True)(images)
    assert x.dtype == torch.float32
    for n, c, i, j in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 4), (1, 0, 3, 0)]:
        pixel = float(images[n, 2 - c, i + 1, j + 1])  # rows 1..4 of 7, columns 1..6 of 9
        expected = (pixel / 200 - (0.1, 0.2, 0.3)[c]) / (0.5, 0.6, 0.7)[c]
        assert x[n, c, i, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert x.shape == (2, 3, 4, 6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"torch.float32 of shape \(1, 3, 8, 8\); give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"uint8 of shape \(3, 8, 8\); give uint8"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "1 channels, but the network takes 3; conv"),
        (torch.zeros(1, 3, 8, 7, dtype=torch.uint8), "8x7, smaller than .* 8x8; load .* size=8"),
    ],
)
def test_preprocess_refuses(images, message):
    with pytest.raises(SubbyteError, match=message):
        Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "1 means and 2 stds; give one"),
        ({"mean": (0.5,), "std": (0.0,)}, "std .0.0,. and scale 255.0; all must be above 0"),
        ({"mean": (0.5,), "std": (0.5,), "bgr": True}, "bgr=True with 1 channels; BGR needs 3"),
    ],
)
def test_preprocess_refuses_its_own_arguments(arguments, message):
    with pytest.raises(SubbyteError, match=message):
        Preprocess(None, **arguments)


def test_resnet_shortcut_is_option_a():
    x = torch.randn(2, 16, 6, 6)
    y = Block(16, 32, stride=2)._shortcut(x)
    expected = torch.zeros(2, 32, 3, 3)
    for c in range(16):
        for i in range(3):
            for j in range(3):
                expected[:, 8 + c, i, j] = x[:, c, 2 * i, 2 * j]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9])
def test_mobilenet_padding_is_tensorflows_same(length):
    total = max((-(-length // 2) - 1) * 2 + 3 - length, 0)
    padded = _pad_same(torch.ones(1, 1, length, 6))
    assert padded.shape[2] == length + total
    assert padded[0, 0, :, 1].tolist() == [0] * (total // 2) + [1] * length + [0] * (
        total - total // 2
    )


def test_mobilenet_convolutions_are_plain():
    convolutions = [m for m in build("mobilenetv1").modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 27
    assert {type(m) for m in convolutions} == {nn.Conv2d}
    assert {m.padding for m in convolutions if m.stride == (2, 2)} == {(0, 0)}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet21", {}, r"no network 'resnet21'; did you mean 'resnet2?0?.*Known: fcnn1, "),
        ("fcnn1", {"depth": 3}, "'fcnn1' has no argument 'depth'; it takes in_channels, image_s"),
        ("vgg7", {"classes": 0}, "classes=0 of network 'vgg7' .* 1 or more; give one"),
        ("vgg7", {"classes": "ten"}, "classes='ten' of network 'vgg7'"),
        ("cvnn1", {"in_channels": 1.5}, "in_channels=1.5 of network 'cvnn1'"),
        ("cvnn1", {"image_size": 7}, "image_size=7 is too small for network 'cvnn1'.*use 8"),
        ("vit2", {"patch": 5}, "image_size=32 of network 'vit2' is not a multiple of patch=5"),
        ("mobilenetv1", {"width": 0}, "width=0 of network 'mobilenetv1' .* usual widths"),
        ("mobilenetv1", {"width": "1"}, "width='1' of network 'mobilenetv1'"),
        ("mobilenetv1", {"width": float("nan")}, "width=nan of network 'mobilenetv1'"),
    ],
)
def test_build_refuses(name, arguments, message):
    with pytest.raises(SubbyteError, match=message) as caught:
        build(name, **arguments)
    assert "\n" not in str(caught.value)


def test_load_weights_round_trip_from_float16_without_counters(tmp_path):
    torch.manual_seed(0)
    net = build("digitsnet")
    net(torch.randn(4, 1, 8, 8))  # running statistics that are not their defaults
    state = {k: v.half() for k, v in net.state_dict().items() if v.is_floating_point()}
    save_file(state, tmp_path / "w.safetensors")
    other = build("digitsnet")
    load_weights(other, tmp_path / "w.safetensors")
    loaded = other.state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in state.items())
    assert {v.dtype for k, v in loaded.items() if k in state} == {torch.float32}


def spoiled(state, how):
    """The state with a key taken away, added, of another shape or of another kind."""
    bias = state["classifier.4.bias"]
    changes = {
        "missing": {"classifier.4.bias": None},
        "unexpected": {"extra.weight": bias.clone()},
        "shape": {"classifier.4.bias": torch.zeros(9)},
        "kind": {"classifier.4.bias": torch.zeros(10, dtype=torch.int8)},
    }[how]
    return {k: v for k, v in {**state, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"w.safetensors misses classifier.4.bias; .* build the one"),
        ("unexpected", r"w.safetensors has unexpected extra.weight; .* build the one"),
        ("shape", r"other shapes for classifier.4.bias float\[9\] \(the network: float\[10\]\)"),
        ("kind", r"classifier.4.bias int8\[10\] \(the network: float\[10\]\)"),
    ],
)
def test_load_weights_refuses_what_does_not_fit(tmp_path, how, message):
    net = build("digitsnet")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    save_file(spoiled(build("digitsnet").state_dict(), how), tmp_path / "w.safetensors")
    with pytest.raises(SubbyteError, match=message) as caught:
        load_weights(net, tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_load_weights_names_only_the_first_few(tmp_path):
    save_file(build("resnet32").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(SubbyteError, match=r"unexpected (\S+, ){2}\S+ and \d+ more; it holds"):
        load_weights(build("resnet20"), tmp_path / "w.safetensors")


def test_load_weights_refuses_missing_and_truncated_files(tmp_path):
    net, path = build("digitsnet"), tmp_path / "w.safetensors"
    with pytest.raises(SubbyteError, match=r"no weights file .*w.safetensors; check the path"):
        load_weights(net, path)
    save_file(net.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SubbyteError, match=r"w.safetensors is not a whole safetensors file"):
            load_weights(net, path)


def train_digits(net, epochs, seed=0):
    """A short AdamW run on the embedded digits; returns the test accuracy in percent."""
    torch.manual_seed(seed)
    data, generator = load_images("digits", "train"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    steps = epochs * -(-len(data) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(epochs):
        for images, labels in batches(data, 64, generator=generator):
            loss = nn.functional.cross_entropy(net(net.preprocess(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return accuracy(net, load_images("digits", "test"))


def accuracy(net, data):
    """Top-1 in percent."""
    right = 0
    with torch.inference_mode():
        for images, labels in batches(data, 100):
            right += int((net.eval()(net.preprocess(images)).argmax(1) == labels).sum())
    return 100 * right / len(data)


def test_digitsnet_learns_the_digits():
    torch.manual_seed(0)
    assert train_digits(build("digitsnet"), epochs=4) > 95


@pytest.mark.slow
def test_digitsnet_learns_the_digits_well():
    torch.manual_seed(0)
    assert train_digits(build("digitsnet"), epochs=15) > 98


@pytest.fixture(scope="module")
def shared_images(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return lambda name: load_images(str(SHARED / name), "test", cache_dir=cache)


def with_weights(name, file):
    net = build(name)
    load_weights(net, SHARED / "weights" / file)
    return net


@needs_shared
def test_resnet20_on_500_cifar_images(shared_images):
    net = with_weights("resnet20", "resnet20_cifar10.safetensors")
    assert accuracy(net, shared_images("cifar10").head(500)) >= 88


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("name", "file", "source", "right", "of"),
    [
        ("resnet20", "resnet20_cifar10", "cifar10", 9173, 10_000),
        ("mobilenetv1", "mobilenet_v1_075_imagenet", "imagenet1000", 521, 600),
        ("squeezenet11", "squeezenet11_imagenet", "imagenet1000", 381, 600),
    ],
)
def test_published_accuracy(shared_images, name, file, source, right, of):
    data = shared_images(source)
    assert len(data) == of
    assert accuracy(with_weights(name, f"{file}.safetensors"), data) == pytest.approx(
        100 * right / of, abs=1e-9
    )


@needs_shared
def test_float16_weights_become_float32():
    net = with_weights("squeezenet11", "squeezenet11_imagenet.safetensors")
    stored = load_file(SHARED / "weights/squeezenet11_imagenet.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.classifier.bias, stored["classifier.bias"].float())


def test_a_width_of_one_s_own_is_part_of_the_spec():
    net = build("cvnn1", width=8)
    again = build(net.spec.name, **net.spec.arguments)
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]
    assert net.features[0].weight.shape[0] == 8
    assert build("cvnn1").features[0].weight.shape[0] == 32
    with pytest.raises(SubbyteError, match="width=0 of network 'cvnn1'"):
        build("cvnn1", width=0)
