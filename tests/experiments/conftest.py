"""Runs that several tests look at; each is trained once."""

import pytest
import runs
from tiny_corpus import write_texts

from experiments import train


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where compiled functions are kept, for this process and those it starts."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiler(cache):
    """Compiles as the runs below do, for the tests of a file."""
    with runs.compiler(cache):
        yield


def trained(cache, folder, words):
    """The workdir of a finished run."""
    with runs.compiler(cache):
        assert runs.call(train, *words, f"--workdir={folder}") == 0
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of text."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def two(texts, cache, tmp_path_factory):
    """The workdir of a finished run with two streams, and its checkpoints of steps 3, 6, 8."""
    words = runs.arguments(texts, train__checkpoint_every=3)
    return trained(cache, tmp_path_factory.mktemp("two") / "run", words)


@pytest.fixture(scope="session")
def one(texts, cache, tmp_path_factory):
    """The workdir of a finished run of the plain model."""
    words = runs.arguments(texts, model__streams=1)
    return trained(cache, tmp_path_factory.mktemp("one") / "run", words)


@pytest.fixture(scope="session")
def family(texts, one, cache, tmp_path_factory):
    """A workdir with streams for P = 2 and P = 4 on the plain model's weights."""
    folder = tmp_path_factory.mktemp("family") / "run"
    for streams in (2, 4):
        second = {"train__init_from": one, "train__trainable": "streams"}
        words = runs.arguments(texts, model__streams=streams, train__checkpoint_every=3, **second)
        trained(cache, folder, words)
    return folder
