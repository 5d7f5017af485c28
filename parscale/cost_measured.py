"""The machine at hand as a chip, and decoding timed on it: what a cost model is held to."""

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.transformer import LanguageModel
from parscale import generate
from parscale.chips import Chip

CALLS = 10
ROUNDS = 5


def measure_chip(dtype: str, copied: int) -> Chip:
    """The first device with the rates that it reaches now, in a matrix product and in a copy.

    Args:
      dtype: of the product.
      copied: bytes of the copy; as many as a pass reads, for on a CPU they may stay in its caches.
    """
    device = jax.devices()[0]
    size = 1024 if device.platform == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product_seconds = _least_seconds(lambda _: product(matrix, matrix), matrix)
    # In place: fresh memory would add the time in which the system hands it out.
    copy = jax.jit(jnp.negative, donate_argnums=0)
    elements = max(copied // 4, 1)
    copy_seconds = _least_seconds(copy, jnp.ones(elements, jnp.float32))
    limits = device.memory_stats() or {"bytes_limit": _host_memory()}
    return Chip(
        name=device.device_kind,
        flops=2 * size**3 / product_seconds,
        memory=limits["bytes_limit"],
        bandwidth=2 * 4 * elements / copy_seconds,
    )


class Decoding(NamedTuple):
    """Seconds that decoding took, from the least times of several rounds.

    Attributes:
      prefill: until the first token of every row.
      step: mean of those after it.
    """

    prefill: float
    step: float


def measure_decoding(
    models: Sequence[ModelConfig], batch: int, prompt: int, output: int
) -> list[Decoding]:
    """Latency of greedy decoding with random weights, for each model in turn and so again.

    Args:
      models: what to run.
      batch: rows at a time.
      prompt: tokens of each prompt.
      output: tokens generated for each, at least 2.
    """
    runs = [_decoding(model, batch, prompt, output) for model in models]
    for run in runs:
        run()  # compiles
    rounds = [[run() for run in runs] for _ in range(ROUNDS)]
    decodings = []
    for times in zip(*rounds, strict=True):
        # Not the least difference: that is of the round whose prefill was held up most.
        first, whole = (min(values) for values in zip(*times, strict=True))
        decodings.append(Decoding(first, (whole - first) / (output - 1)))
    return decodings


def _decoding(
    model: ModelConfig, batch: int, prompt: int, output: int
) -> Callable[[], tuple[float, float]]:
    """What measures the seconds to the first token of every row, and to the last."""
    model = LanguageModel(model, rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    engine = generate.engine_for(model, prompts.tolist(), output)

    def seconds(tokens: int) -> float:
        generate.submit_all(engine, prompts.tolist(), tokens)
        start = time.perf_counter()
        engine.run()
        return time.perf_counter() - start

    return lambda: (seconds(1), seconds(output))


def _least_seconds(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """The least time of a function, each result of which is the next argument."""
    x = jax.block_until_ready(run(x))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        x = jax.block_until_ready(run(x))
        times.append(time.perf_counter() - start)
    return min(times)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
