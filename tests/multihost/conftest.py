"""What the runs of several processes share."""

import pytest
from tiny_corpus import write_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of text."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where compiled functions are kept."""
    return tmp_path_factory.mktemp("cache")
