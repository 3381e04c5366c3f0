"""Checksums: a bit that changed anywhere in a file is an error, and never another network."""

import json
import random

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import subbyte as sb
from nets import Mixed, mixed_input
from subbyte import CoRa, LowRes, SubbyteError, storage
from subbyte.cli import app, main
from subbyte.storage.digests import HEADER


def trained(levels=5, **options):
    net = Mixed()
    sb.prepare(net, LowRes(levels=levels, **options))
    return sb.pack(sb.freeze(net))


def adapted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    method = CoRa(levels=3, target_bits=6, tune=0)
    return sb.pack(sb.quantize(net, method, calibration=[torch.randn(40, 24)]))


FILES = {
    "words": lambda path: sb.save(trained(), path, example=mixed_input()),
    "compressed": lambda path: sb.save(trained(3), path, compress=True),
    "powers of two, per channel": lambda path: sb.save(
        trained(4, granularity="channel", scale_domain="power_of_two"), path
    ),
    "an adapter": lambda path: sb.save(adapted(), path),
}


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    path = tmp_path / "net.safetensors"
    FILES[request.param](path)
    return path


def flipped(data, place, bit):
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_a_flipped_bit_anywhere_is_an_error(file):
    """At random places, in the header as in the tensors, and at every place of the first 100."""
    data, draw = file.read_bytes(), random.Random(0)
    storage.read(file)
    end = 8 + int.from_bytes(data[:8], "little")
    places = [*range(100), *(draw.randrange(end) for _ in range(200)),
              *(draw.randrange(end, len(data)) for _ in range(200))]  # fmt: skip
    for place in places:
        file.write_bytes(flipped(data, place, draw.randrange(8)))
        with pytest.raises(SubbyteError) as caught:
            storage.read(file)
        assert str(file) in str(caught.value)
        assert len(str(caught.value)) < 2000


def test_the_error_names_the_tensor(file):
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    del header["__metadata__"]
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if start == stop:
            continue
        file.write_bytes(flipped(data, end + (start + stop) // 2, 0))
        with pytest.raises(SubbyteError, match=r"checksum|NaN|variance") as caught:
            storage.read(file)
        assert f"'{name}'" in str(caught.value)


def test_verifying_can_be_left_out(file, tmp_path):
    data = file.read_bytes()
    name = next(iter(storage.read(file).names))
    end = 8 + int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8:end])[name]["data_offsets"]
    for bit in range(8):  # one of them leaves words that decode
        file.write_bytes(flipped(data, end + start, bit))
        with pytest.raises(SubbyteError):
            storage.read(file)
    storage.read(file, verify=False)


def test_a_file_without_checksums_opens_and_verify_says_so(tmp_path, capsys, monkeypatch):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, old = tmp_path / "net.safetensors", tmp_path / "old.safetensors"
    FILES["words"](path)
    with safe_open(path, "pt") as held:
        metadata = dict(held.metadata())
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    del metadata[HEADER]
    manifest = json.loads(metadata["subbyte"])
    stated = manifest.pop("sha256")
    assert len(stated) == len(tensors)
    save_file(tensors, old, {"subbyte": json.dumps(manifest)})
    assert storage.read(old).digests == ()
    monkeypatch.setattr("sys.argv", ["subbyte", "verify", str(old)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "has no checksums" in capsys.readouterr().err

    manifest["sha256"] = stated  # of the tensors, and none of the header
    save_file(tensors, old, {"subbyte": json.dumps(manifest)})
    with pytest.raises(SubbyteError, match="header's checksum"):
        storage.read(old)
    manifest["sha256"] = stated[:-1]
    save_file(tensors, old, {"subbyte": json.dumps(manifest), HEADER: "0" * 64})
    with pytest.raises(SubbyteError, match="header's checksum"):
        storage.read(old)


def test_the_command_says_what_it_compared(file):
    found = CliRunner().invoke(app, ["verify", str(file), "--json"])
    assert found.exit_code == 0
    said = json.loads(found.output)
    assert said["tensors"] == len(storage.read(file).names)
    assert said["bytes"] == file.stat().st_size
    assert "all as they were written" in CliRunner().invoke(app, ["verify", str(file)]).output
