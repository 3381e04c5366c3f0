"""Packed weights stay in their file: what is read when, and what is checked when."""

import copy
import pickle

import pytest
import torch
from torch import nn

import subbyte as sb
from subbyte import storage
from subbyte.packing import StoredTensor, radix

pytest.importorskip("subbyte._native", reason="the C++ core was not built")

LEVELS = (2, 3, 4, 5, 9, 16, 17, 255, 256)
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))


def packed(levels=3):
    model = net()
    sb.prepare(model, sb.LowRes(levels=levels))
    return sb.pack(sb.freeze(model))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.safetensors"
    sb.save(packed(), path)
    return path


def spoil(path, name):
    """The first word of a layer becomes one that holds no codes of 3 levels."""
    words = bytes(storage.read(path).tensors[f"{name}.codes"][:64].tolist())
    data = path.read_bytes()
    assert data.count(words) == 1
    path.write_bytes(data.replace(words[:8], b"\xff" * 8, 1))


def test_words_are_parts_of_the_file_with_storages_of_their_own(file):
    opened, before = sb.load(file, net()), packed()
    for own, like in ((opened[0].packed, before[0].packed), (opened[2].packed, before[2].packed)):
        assert torch.equal(own.words, like.words)
        assert own.words.untyped_storage().nbytes() == own.words.numel()
    assert opened[0].packed.words.data_ptr() % 8 == 0


def test_a_network_outlives_its_file(file):
    opened = sb.load(file, net(), verify=False)
    sb.save(packed(levels=5), file)  # another file of that name
    assert torch.equal(opened(X), packed()(X))
    file.unlink()
    for twin in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened[0]))):
        assert twin(X).isfinite().all()


def test_writing_to_a_network_does_not_write_to_its_file(file):
    before = file.read_bytes()
    opened = sb.load(file, net())
    opened[0].packed.words.zero_()
    assert file.read_bytes() == before


def test_a_spoilt_word_is_found_at_load_or_when_its_layer_runs(file):
    spoil(file, "2")
    with pytest.raises(sb.SubbyteError, match="checksum of tensor '2\\.codes'"):
        sb.load(file, net())
    opened = sb.load(file, net(), verify=False)
    for _ in range(2):  # it stays an error
        with pytest.raises(sb.SubbyteError, match="above the grid"):
            opened(X)
    with pytest.raises(sb.SubbyteError, match="above the grid"):
        storage.read(file, verify=False).layers()["2"].dequantize()


@pytest.mark.parametrize("levels", LEVELS)
def test_words_pass_exactly_if_they_hold_codes(levels):
    digits, generator = radix.digits_per(levels, 64), torch.Generator().manual_seed(levels)
    top = levels**digits
    numbers = [0, 1, top - 1, min(top, 2**64 - 1), 2**63 - 1, 2**63, 2**64 - 1]
    numbers += torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator).tolist()
    for number in numbers:
        word = (number % 2**64).to_bytes(8, "little")
        for count, words in ((digits, word), (2 * digits, word + bytes(8)), (digits - 1, word)):
            if count < 1:
                continue
            stored = torch.frombuffer(bytearray(words), dtype=torch.uint8)
            again = radix.pack(radix.unpack_torch(stored, levels, count), levels)
            assert (radix.check_words(stored, levels, count) is None) == torch.equal(again, stored)


def test_a_stored_weight_is_the_quantized_one():
    value = packed()[0].packed.quantized()
    words = radix.pack(value.codes, 3)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), words])[3:]  # not on 8 bytes
    for own in (words, shifted):
        stored = StoredTensor(own, value.scale, value.grid, value.shape, checked=True)
        assert torch.equal(stored.codes, value.codes)
        assert torch.equal(stored.dequantize(), value.dequantize())
        assert (stored.shape, stored.n_bytes) == (value.shape, value.n_bytes)
    with pytest.raises(sb.SubbyteError, match="negative"):
        StoredTensor(words, -value.scale, value.grid, value.shape, checked=False)
    with pytest.raises(sb.SubbyteError, match="codes of 3 levels take"):
        StoredTensor(words[8:], value.scale, value.grid, value.shape, checked=False)
