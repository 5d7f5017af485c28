"""Eight CPU devices for every test, so that meshes can be tried anywhere."""

import os

# XLA's executions on many fake devices wait for each other; with fewer threads than devices they
# hang and abort after a minute.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
