"""The demo's claims, on a run cut short: agreement, sizes and the picture."""

from dataclasses import replace

import pytest

from subbyte import SubbyteError
from subbyte.commands import demo


@pytest.fixture
def short(monkeypatch):
    loop = replace(demo.BASE.train, epochs=2, threads=1)
    monkeypatch.setattr(demo, "BASE", replace(demo.BASE, train=loop))


def test_the_demo_compares_three_versions(short, tmp_path):
    result = demo.run_demo(tmp_path, quiet=True)
    assert [row.name for row in result.rows] == ["float32", "5 levels", "3 levels"]
    for row in result.rows:
        assert row.top1 == row.top1_of_file
        assert row.top1 > 90
    _, five, three = result.rows
    assert five.reduction >= 12
    assert five.bits_per_weight <= 2.39
    assert three.reduction >= 18
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert 0 < result.without_torch_us < 1e5
    assert (tmp_path / "5-levels" / "net.safetensors").stat().st_size == five.file_bytes


def test_the_demo_fails_when_a_file_disagrees(short, tmp_path, monkeypatch):
    real = demo.storage.load

    def wrong(path, precision):
        net = real(path, precision=precision)
        net.classifier[1].packed.scale.mul_(1.01)
        return net

    monkeypatch.setattr(demo.storage, "load", wrong)
    with pytest.raises(SubbyteError, match="differ from training"):
        demo.run_demo(tmp_path, quiet=True)
