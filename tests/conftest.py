"""What every test stands on: nothing is kept outside the folders that tests are given."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Encoders that evaluations train are kept for the session, and shared by the workers of one."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ANCESTRAL_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield
