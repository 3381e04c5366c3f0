import pytest
from hypothesis import settings

settings.register_profile("subbyte", deadline=None, print_blob=True)
settings.load_profile("subbyte")


@pytest.fixture
def restored_tier():
    """The instruction set in use is afterwards what it was before."""
    from subbyte import _native

    before = _native.tier()
    yield
    _native.select_tier(before)
