"""What `experiments.bench` times of linear attention on the CPU."""

from experiments.workloads import Runs, op_runs

HEADS, HEAD_DIM = 4, 64
LENGTH = 2048  # of the comparison with the recurrence
LENGTHS = (2048, 32768)
RECURRENCES = {
    "retention": ("log_decay",),
    "mLSTM": ("log_decay", "input_gate"),
    "GLA": ("log_decay per key",),
    "DeltaNet": ("beta",),
    "gated DeltaNet": ("log_decay", "beta"),
    "KDA": ("log_decay per key", "beta"),
}
"""Recurrences by name, and the gates that each has."""


def linear_attention(shape: dict, recurrence: str, length: int, implementation: str | None) -> Runs:
    """`pallas_kernels.linear_attention`, [1, T, 4 heads, 64] float32; `shape` is not looked at."""
    del shape
    import jax.numpy as jnp

    from pallas_kernels import linear_attention as op

    arrays, gates = inputs(recurrence, length, (1, length, HEADS, HEAD_DIM))

    def run(q, k, v, gates):
        normalize = recurrence == "mLSTM"
        return op(q, k, v, **gates, normalize=normalize, implementation=implementation)[0]

    arrays = [jnp.asarray(array) for array in arrays]
    return op_runs(run, [*arrays, {name: jnp.asarray(gate) for name, gate in gates.items()}])


def inputs(recurrence: str, seed: int, size: tuple[int, int, int, int]):
    """Random float32 q, k, v of this size, keys of norm 1, and the gates by name."""
    import numpy as np

    random = np.random.default_rng(seed)
    normal = lambda *size: random.standard_normal(size, np.float32)
    q, k, v = (normal(*size) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    make = {
        "log_decay": lambda: -0.1 * np.abs(normal(*size[:3])),
        "log_decay per key": lambda: -0.1 * np.abs(normal(*size)),
        "input_gate": lambda: normal(*size[:3]),
        "beta": lambda: random.random(size[:3], np.float32),
    }
    return (q, k, v), {name.split()[0]: make[name]() for name in RECURRENCES[recurrence]}
