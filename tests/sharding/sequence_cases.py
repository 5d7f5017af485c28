"""What tests of the sequence axis share: meshes, and results with gradients on them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from sharding import rules, sequence
from sharding.mesh import MeshConfig, make_mesh

HEADS = ("batch", "streams", "length", "heads", None)


def spec():
    """Partition of `[B, P, T, H, h]`."""
    return rules.partition_spec(HEADS)


@contextlib.contextmanager
def on_mesh(attention="auto", state="auto", **axes):
    """Traced with these schemes on a mesh of as many devices as the axes take."""
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes), jax.devices()[:count])
    with jax.set_mesh(mesh), sequence.using(attention, state):
        yield mesh


def with_gradients(op, arrays, *rest):
    """Results of `op(arrays, *rest)` and gradients of all `arrays`, for one cotangent each.

    Returns:
      the function, compiled, of `arrays` and `rest`, to the pair of them.
    """

    def function(arrays, *rest):
        results, pull = jax.vjp(lambda arrays: op(arrays, *rest), arrays)
        wave = lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
        return results, pull(jax.tree.map(wave, results))[0]

    return jax.jit(function)(arrays, *rest)


def errors(got, expected) -> dict[str, float]:
    """RMS of the difference over RMS of what is expected, of each array of a tree."""
    found = {}
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.sqrt(np.mean(y**2)), 1e-30)
        found[jax.tree_util.keystr(path)] = np.sqrt(np.mean((x - y) ** 2)) / scale
    return found
