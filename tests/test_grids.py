import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subbyte import Grid, PerChannel, PerTensor, ScaleDomain, SubbyteError, fixed_point, uniform


@given(st.integers(2, 256))
def test_uniform_levels_are_even_and_symmetric(n):
    grid = uniform(n)
    assert grid.n_levels == n
    assert grid.levels[0] == -1.0
    assert grid.levels[-1] == 1.0
    assert all(a == -b for a, b in zip(grid.levels, reversed(grid.levels), strict=True))
    assert grid.step == pytest.approx(2 / (n - 1), rel=1e-12)
    assert grid.bits == math.log2(n)
    assert grid.has_zero == (n % 2 == 1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_fixed_point_levels_are_the_symmetric_integers(bits):
    grid = fixed_point(bits)
    top = 2 ** (bits - 1) - 1
    assert grid.levels == tuple(float(i) for i in range(-top, top + 1))
    assert grid.scale_domain is ScaleDomain.POWER_OF_TWO
    assert grid.step == 1.0


def test_uneven_levels_have_no_step():
    grid = Grid((-1.0, 0.0, 0.25, 1.0))
    assert grid.step is None
    assert grid.affine is None


@given(
    st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=2, max_size=256, unique=True),
    st.one_of(st.just(PerTensor()), st.builds(PerChannel, st.integers(0, 4))),
    st.sampled_from(ScaleDomain),
)
def test_dict_form_gives_an_equal_grid_back(levels, granularity, domain):
    grid = Grid(tuple(sorted(levels)), granularity, domain)
    assert Grid.from_dict(grid.to_dict()) == grid


@given(st.integers(2, 256))
def test_affine_form_has_the_bits_of_the_table_in_float32(n):
    grid = uniform(n)
    offset, inverse = grid.affine
    computed = (torch.arange(n, dtype=torch.float32) + offset) / inverse
    assert torch.equal(computed, torch.tensor(grid.levels, dtype=torch.float32))


@pytest.mark.parametrize("n", [1, 0, -3, 257, 2.0, "5", True, None])
def test_uniform_names_a_bad_level_count(n):
    with pytest.raises(SubbyteError, match=f"levels={n!r}.*2 to 256"):
        uniform(n)


@pytest.mark.parametrize("bits", [1, 9, 2.5, None])
def test_fixed_point_names_bad_bits(bits):
    with pytest.raises(SubbyteError, match=f"bits={bits!r}.*2 to 8"):
        fixed_point(bits)


@pytest.mark.parametrize(
    ("levels", "says"),
    [((1.0,), "1 levels"), ((0.0, 0.0), "increase"), ((1.0, -1.0), "increase"),
     ((0.0, math.nan), "finite"), ((0.0, math.inf), "finite")],
)  # fmt: skip
def test_a_grid_refuses_levels_that_are_none(levels, says):
    with pytest.raises(SubbyteError, match=says):
        Grid(levels)


@pytest.mark.parametrize(
    "value", [{}, {"levels": 3, "channel_axis": None, "scale_domain": "float32"},
              {"levels": [0, 1], "channel_axis": None, "scale_domain": "float8"},
              {"levels": [0, 1], "channel_axis": -1, "scale_domain": "float32"},
              {"levels": ["a", "b"], "channel_axis": 0, "scale_domain": "float32"}],
)  # fmt: skip
def test_from_dict_refuses_what_is_no_grid(value):
    with pytest.raises(SubbyteError):
        Grid.from_dict(value)


def test_a_grid_read_by_another_process_hashes_as_its_own():
    script = (
        "import pickle, sys; from subbyte import uniform; a = uniform(5);"
        "b = pickle.loads(bytes.fromhex(sys.argv[1])); print(a == b, hash(a) == hash(b))"
    )
    data = pickle.dumps(uniform(5)).hex()
    for seed in ("1", "2"):  # one of them hashes strings otherwise than this process
        found = subprocess.run(
            [sys.executable, "-c", script, data], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert found.stdout.split() == ["True", "True"]
