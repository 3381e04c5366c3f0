"""Damaged files: a reader says what is wrong in one short line, soon, without memory for it."""

import dataclasses
import io
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

import subbyte as sb
from subbyte import storage
from subbyte.models import build
from subbyte.packing import radix

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import checkpoints  # noqa: E402 - scripts, as in test_documents.py
import damage  # noqa: E402
import flips  # noqa: E402
import fuzz  # noqa: E402
import specimens  # noqa: E402

CORPUS = sorted((ROOT / "tests/corpus").glob("*.safetensors"))

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc"
)


@pytest.fixture(scope="module", autouse=True)
def files():
    found = specimens.files()
    fuzz.warm(found)
    return found


@pytest.fixture(autouse=True)
def limits():
    before = signal.signal(signal.SIGPROF, fuzz.alarm)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_once_was_a_fault_is_refused(path):
    said, fault = fuzz.tried(sb.load, path, path.stat().st_size)
    assert fault is None
    assert said
    for reader in fuzz.READERS.values():
        assert fuzz.tried(reader, path, path.stat().st_size)[1] is None


def test_damaged_files_are_refused_or_taken(files, tmp_path):
    path, kinds = tmp_path / "net.safetensors", set()
    for number in range(150):
        kind, data = damage.damaged(files[random.Random(number).choice(list(files))],
                                    random.Random(f"test {number}"))  # fmt: skip
        path.write_bytes(data)
        kinds.add(kind)
        for name, reader in fuzz.READERS.items():
            assert fuzz.tried(reader, path, len(data))[1] is None, (number, kind, name)
    assert kinds == set(damage.KINDS)


@pytest.mark.parametrize("name", specimens.WRITERS)
def test_what_is_taken_apart_is_the_same_file_when_put_together(files, name, tmp_path):
    """Else every case of damage would be refused for its checksum alone."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(damage.Parts.of(files[name]).to_bytes())
    found = storage.read(path)
    assert found.digests
    sb.load(path)


@pytest.mark.parametrize("name", specimens.WRITERS)
def test_a_flipped_bit_of_any_encoding_is_an_error(files, name, tmp_path):
    path, data, draw = tmp_path / "net.safetensors", files[name], random.Random(1)
    path.write_bytes(data)
    assert flips.accepted(path)
    for _ in range(40):
        path.write_bytes(flips.flipped(data, draw.randrange(len(data)), draw.randrange(8)))
        assert not flips.accepted(path)


def test_the_measure_sees_what_it_is_for(tmp_path):
    path = tmp_path / "none"

    def waits(_):
        while True:
            pass

    def fails(_):
        raise OverflowError("x")

    def talks(_):
        raise sb.SubbyteError("x" * 1001)

    for reader, says in ((waits, "over 2"), (fails, "OverflowError"), (talks, "1001 characters")):
        assert says in fuzz.tried(reader, path, 0)[1]
    assert "bytes" in fuzz.tried(lambda _: torch.ones(2**25), path, 1000)[1]
    assert fuzz.tried(lambda _: torch.ones(2**22), path, 1000) == ("", None)


def test_a_network_takes_no_memory_before_the_file_is_known_to_hold_it(tmp_path):
    """Positions are no layer's weight: 2,000 x 2,000 of them would be 1.5 GB."""
    path = tmp_path / "net.safetensors"
    sb.save(specimens.trained(build("vit1", in_channels=1, image_size=8), 3), path)
    parts = damage.Parts.of(path.read_bytes())
    parts.manifest["network"]["arguments"]["image_size"] = 8000
    path.write_bytes(parts.to_bytes())
    said, fault = fuzz.tried(sb.load, path, path.stat().st_size)
    assert fault is None
    assert "'positions' has shape (1, 4, 96) in the file, (1, 4000000, 96)" in said


def test_a_network_of_too_many_channels_is_refused_at_once(files, tmp_path):
    """Its mean and deviation, a number for each channel, were made first."""
    path, parts = tmp_path / "net.safetensors", damage.Parts.of(files["zoo"])
    parts.manifest["network"]["arguments"]["in_channels"] = 2**24
    path.write_bytes(parts.to_bytes())
    said, fault = fuzz.tried(sb.load, path, path.stat().st_size)
    assert fault is None
    assert "in_channels=16777216 of network 'digitsnet' is over 1048576" in said


def test_codes_that_would_not_be_read_are_not_written(tmp_path):
    """A layer of one level compresses without end; it stays in words."""
    net = torch.nn.Sequential(torch.nn.Linear(1000, 1000))
    net = specimens.trained(net, 3)
    with torch.no_grad():
        codes = torch.ones(1_000_000, dtype=torch.uint8)
        net[0].packed.words.copy_(radix.pack(codes, 3))
    assert radix.compress(codes, 3).numel() < 200
    sb.save(net, tmp_path / "net.safetensors", compress=True)
    assert storage.read(tmp_path / "net.safetensors").entries["0"].encoding == storage.WORDS
    sb.load(tmp_path / "net.safetensors", torch.nn.Sequential(torch.nn.Linear(1000, 1000)))
    with pytest.raises(sb.SubbyteError, match="more than 100 times"):
        radix.decompress(radix.compress(codes, 3), 3, len(codes))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoints.made()


def momentum(content):
    next(iter(content["optimizer"]["state"].values()))["momentum_buffer"] = torch.zeros(1)


def weight(content):
    content["model"]["classifier.1.bias"] = torch.zeros(3)


FIELDS = {
    "momentum": momentum, "weight": weight,
    **{f"{name} is 1.5": lambda content, name=name: content.update({name: 1.5})
       for name in ("model", "optimizer", "epoch", "history", "histograms", "fingerprint")},
    "history": lambda content: content["history"][0].update(train_loss="x"),
    "histograms": lambda content: content["histograms"][0].update(x=1.5),
    "missing": lambda content: content.pop("epoch"),
    "long": lambda content: content["fingerprint"].update(x="x" * 9999),
    "version": lambda content: content.update(version="x" * 9999),
}  # fmt: skip


@pytest.mark.parametrize("change", FIELDS)
def test_a_checkpoint_that_lies_is_refused(checkpoint, change, tmp_path):
    content = torch.load(io.BytesIO(checkpoint[:-47]), weights_only=True)
    FIELDS[change](content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoints.sealed(buffer.getvalue()))
    said, fault = fuzz.tried(checkpoints.resumed, path, len(checkpoint))
    assert fault is None
    assert "checkpoint" in said


def test_a_whole_checkpoint_goes_on(checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint)
    assert fuzz.tried(checkpoints.resumed, path, len(checkpoint)) == ("", None)


def test_the_fields_that_are_checked_are_the_checkpoints_own():
    from subbyte.train.checkpoint import _KINDS, Checkpoint

    assert set(_KINDS) == {field.name for field in dataclasses.fields(Checkpoint)}
