"""Fixtures of the tests of data."""

import pytest


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of this test's own."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return library
