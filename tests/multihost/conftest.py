"""What the runs of several processes share."""

import processes
import pytest


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of text."""
    return processes.write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where compiled functions are kept."""
    return tmp_path_factory.mktemp("cache")
