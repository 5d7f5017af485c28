"""Eight CPU devices for every test, so that meshes can be tried anywhere."""

import os

# XLA's executions on many fake devices wait for each other; with fewer threads than devices they
# hang and abort after a minute.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def no_functions_of_other_files():
    """Drops what a file has compiled: of all files together it fills memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def little_optimization():
    """For tests that spend nearly all their time on compiling."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
