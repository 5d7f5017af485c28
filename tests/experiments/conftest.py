"""Runs that several tests look at; each is trained once."""

import jax
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache

from experiments import train


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where compiled functions are kept, for this process and those it starts.

    Nearly all the time of a tiny run is spent compiling it.
    """
    folder = tmp_path_factory.mktemp("cache")
    settings = runs.COMPILER | {"jax_compilation_cache_dir": str(folder)}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def texts(cache, tmp_path_factory):
    """A folder of text."""
    return runs.write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def two(texts, tmp_path_factory):
    """The workdir of a finished run with two streams, and its checkpoints of steps 3, 6, 8."""
    folder = tmp_path_factory.mktemp("two") / "run"
    words = runs.arguments(texts, train__checkpoint_every=3)
    assert runs.call(train, *words, f"--workdir={folder}") == 0
    return folder


@pytest.fixture(scope="session")
def one(texts, tmp_path_factory):
    """The workdir of a finished run of the plain model."""
    folder = tmp_path_factory.mktemp("one") / "run"
    words = runs.arguments(texts, model__streams=1)
    assert runs.call(train, *words, f"--workdir={folder}") == 0
    return folder


@pytest.fixture(scope="session")
def family(texts, one, tmp_path_factory):
    """A workdir with streams for P = 2 and P = 4 on the plain model's weights."""
    folder = tmp_path_factory.mktemp("family") / "run"
    for streams in (2, 4):
        second = {"train__init_from": one, "train__trainable": "streams"}
        words = runs.arguments(texts, model__streams=streams, train__checkpoint_every=3, **second)
        assert runs.call(train, *words, f"--workdir={folder}") == 0
    return folder
