import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subbyte import SubbyteError
from subbyte.packing import radix


@st.composite
def coded(draw):
    n = draw(st.integers(2, 256))
    count = draw(st.one_of(st.integers(0, 300), st.integers(0, 5000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return n, torch.randint(0, n, (count,), generator=generator, dtype=torch.uint8)


def reference_words(codes, n):
    """Python integers: the specification, literally."""
    digits = 0
    while n ** (digits + 1) <= 2**64:
        digits += 1
    data = b""
    for start in range(0, len(codes), digits):
        word = sum(int(c) * n**k for k, c in enumerate(codes[start : start + digits]))
        data += word.to_bytes(8, "little")
    return list(data)


@given(coded())
def test_words_follow_the_specification(case):
    n, codes = case
    assert radix.pack(codes, n).tolist() == reference_words(codes.tolist(), n)


@given(coded())
def test_both_paths_agree_and_give_the_codes_back(case):
    n, codes = case
    packed = radix.pack(codes, n)
    assert torch.equal(packed, radix.pack_torch(codes, n))
    assert torch.equal(radix.unpack(packed, n, len(codes)), codes)
    assert torch.equal(radix.unpack_torch(packed, n, len(codes)), codes)
    assert radix.check_words(packed, n, len(codes)) is None


@given(coded())
def test_compressed_codes_come_back(case):
    n, codes = case
    assert torch.equal(radix.decompress(radix.compress(codes, n), n, len(codes)), codes)


def test_the_core_was_built():
    assert radix.why_not_native(torch.device("cpu")) is None
    assert "cuda" in radix.why_not_native(torch.device("cuda"))


def test_without_the_core_everything_works(monkeypatch):
    monkeypatch.setattr(radix, "_native", None)
    assert "not built" in radix.why_not_native(torch.device("cpu"))
    codes = torch.randint(0, 5, (1000,), dtype=torch.uint8)
    assert torch.equal(radix.unpack(radix.pack(codes, 5), 5, 1000), codes)


@pytest.mark.parametrize(
    ("n", "digits"), [(2, 64), (3, 40), (4, 32), (5, 27), (9, 20), (17, 15), (16, 16), (256, 8)]
)
def test_digits_a_word(n, digits):
    assert radix.digits_per(n, 64) == digits


@pytest.mark.parametrize(
    ("n", "bits"), [(2, 1.0), (3, 1.60), (4, 2.0), (5, 2.38), (9, 3.20), (17, 4.27)]
)
@pytest.mark.parametrize("count", [10_000, 10_001, 36_864, 1_000_003])
def test_bits_a_weight(n, bits, count):
    packed = radix.pack(torch.zeros(count, dtype=torch.uint8), n)
    assert 8 * packed.numel() / count <= bits * 1.005


def test_any_shape_packs_in_c_order():
    codes = torch.randint(0, 3, (4, 5, 6), dtype=torch.uint8)
    assert torch.equal(radix.pack(codes, 3), radix.pack(codes.flatten(), 3))
    assert torch.equal(radix.pack(codes.transpose(0, 2), 3),
                       radix.pack(codes.transpose(0, 2).contiguous().flatten(), 3))  # fmt: skip


def test_codes_above_the_grid_are_refused():
    with pytest.raises(SubbyteError, match="code 3 is above the grid of 3 levels"):
        radix.pack(torch.tensor([0, 3], dtype=torch.uint8), 3)
    with pytest.raises(SubbyteError, match=r"torch\.int64"):
        radix.pack(torch.tensor([0, 1]), 3)
    with pytest.raises(SubbyteError, match="above the grid"):
        radix.compress(torch.tensor([5], dtype=torch.uint8), 5)


def test_words_above_the_grid_or_of_a_wrong_size_are_found():
    packed = radix.pack(torch.full((40,), 2, dtype=torch.uint8), 3)
    assert "uint8 [16]" in radix.check_words(packed, 3, 41)
    assert "above the grid" in radix.check_words(torch.full_like(packed, 255), 3, 40)
    stray = radix.pack(torch.full((40,), 2, dtype=torch.uint8), 3)
    assert "stray digit" in radix.check_words(stray, 3, 39)


def test_damaged_frames_are_refused():
    codes = torch.randint(0, 5, (3000,), dtype=torch.uint8)
    frame = radix.compress(codes, 5)
    with pytest.raises(SubbyteError, match="hold 1000 bytes, 1001 are needed"):
        radix.decompress(frame, 5, 3001)
    with pytest.raises(SubbyteError, match="damaged"):
        radix.decompress(frame[:-3], 5, 3000)
    with pytest.raises(SubbyteError, match="damaged"):
        radix.decompress(torch.zeros(20, dtype=torch.uint8), 5, 3000)
    with pytest.raises(SubbyteError, match="damaged"):
        radix.decompress(torch.cat([frame, frame]), 5, 3000)
    stray = radix.compress(torch.full((3,), 4, dtype=torch.uint8), 5)
    with pytest.raises(SubbyteError, match="stray digit"):
        radix.decompress(stray, 5, 1)
    with pytest.raises(SubbyteError, match="above the grid"):
        radix.decompress(radix.compress(torch.full((4,), 255, dtype=torch.uint8), 256), 5, 12)


@pytest.mark.parametrize("shares", [(0.3, 0.4, 0.3), (0.1, 0.2, 0.4, 0.2, 0.1), (0.15, 0.7, 0.15)])
def test_compression_is_within_two_percent_of_the_entropy(shares):
    p = torch.tensor(shares)
    codes = torch.multinomial(p, 300_000, replacement=True).to(torch.uint8)
    from subbyte.core.functional import entropy

    bits = 8 * radix.compress(codes, len(shares)).numel() / codes.numel()
    assert bits <= 1.02 * entropy(codes, len(shares)), bits


def test_unpacking_stays_one_opaque_op_under_compile():
    codes = torch.randint(0, 5, (100,), dtype=torch.uint8)
    packed = radix.pack(codes, 5)
    compiled = torch.compile(lambda p: radix.unpack(p, 5, 100).float() + 1, fullgraph=True)
    assert torch.equal(compiled(packed), codes.float() + 1)


def test_the_custom_op_is_well_formed():
    packed = radix.pack(torch.randint(0, 5, (100,), dtype=torch.uint8), 5)
    result = torch.library.opcheck(radix.radix_unpack, (packed, 5, 100))
    assert set(result.values()) == {"SUCCESS"}
