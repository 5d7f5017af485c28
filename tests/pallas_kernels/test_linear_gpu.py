"""The Mosaic GPU kernels of linear attention: interpreted, compiled for an H200, and on a GPU where
there is one.

The interpreter runs copies and barriers in threads and looks for races between them; it computes
products of tiles as ordinary ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import RECURRENCES, arguments, errors, with_gradients
from test_flash_gpu import interpreter, off_gpu, on_gpu, with_plugin

from experiments import static_gpu
from pallas_kernels import dispatch, linear_attention

__all__ = ["interpreter"]

jitted = jax.jit(with_gradients, static_argnums=(2, 3))


def by_leaf(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def limit(name):
    """Of the error of a result, or of a gradient ("d" and what it is by)."""
    if name in ("dlog_decay", "dbeta", "dinput_gate"):
        return 1e-2
    if name.endswith(".normalizer"):
        # By what outputs are divided by: a product of rounded outputs, which may nearly cancel.
        return 3e-2
    return 6e-3 if name[0] == "d" else 3e-3


def agree(recurrence, T, chunk=64, **sizes):
    """The kernels' results, once they were compared with the recurrence's in float32."""
    arrays, named = arguments(recurrence, T, dtype=jnp.bfloat16, **sizes)
    got = jitted(arrays, named, "pallas_gpu", chunk)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    expected = jitted(wide, named, "oracle")
    found = errors(by_leaf(got), by_leaf(expected))
    assert all(error < limit(name) for name, error in found.items()), found
    for x, name in zip(arrays, "qkv", strict=True):
        assert (got["d" + name].shape, got["d" + name].dtype) == (x.shape, x.dtype)
    return got


ONE = {"B": 1, "P": 1, "K": 1, "H": 1}


@off_gpu
def test_every_token_and_state(interpreter):
    """All that the kernels of one decay for each head can do: the states, gates and documents."""
    agree("mlstm", 70, hk=16, hv=24, initial=True, **ONE)


@off_gpu
@pytest.mark.slow
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_interpreted(recurrence, interpreter):
    """Two streams with their own states, two value heads for a key head, two tiles in a chunk."""
    agree(recurrence, 200, 128, B=1, P=2, K=1, H=2, hk=72, hv=40, initial=True)


@off_gpu
@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["retention", "kda"])
def test_one_token(recurrence, interpreter):
    agree(recurrence, 1, B=1, documents=False, restart=False, initial=True)


@off_gpu
@pytest.mark.slow
def test_correlated_keys(interpreter):
    """With betas up to 2 and nothing that decays, errors of one token are in all later ones."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal((1, 1, 300, 1, *shape))
    k = normal(64) * 0.1 + random.standard_normal(64)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in (normal(64), k, normal(64)))
    named = {"beta": jnp.asarray(2 * random.random((1, 1, 300, 1)), jnp.float32)}
    got = jitted(arrays, named, "pallas_gpu", 64)
    expected = jitted(tuple(x.astype(jnp.float32) for x in arrays), named, "oracle")
    found = errors(got, expected)
    assert max(found[name] for name in ("out", "state")) < 3e-3, found
    assert max(found.values()) < 6e-3, found


@off_gpu
@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-12, 1e6])
def test_any_unit(unit, interpreter):
    """The delta rule's float16 operands hold values and gradients of any magnitude."""
    (q, k, v), named = arguments("gated_delta_net", 70, dtype=jnp.bfloat16, **ONE)
    named["restart_state"] *= unit

    @functools.partial(jax.jit, static_argnums=1)
    def run(v, implementation):
        function = lambda q, k, v: linear_attention(
            q, k, v, **named, implementation=implementation, chunk=64
        )[0]
        out, pull = jax.vjp(function, q.astype(v.dtype), k.astype(v.dtype), v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(out * unit)), strict=True))

    got = run(v * unit, "pallas_gpu")
    expected = run((v * unit).astype(jnp.float32), "oracle")
    assert max(errors(got, expected).values()) < 8e-3


@off_gpu
def test_bad_input(interpreter):
    def call(message, dtype=jnp.bfloat16, chunk=64, **sizes):
        arrays, named = arguments("retention", 9, dtype=dtype, **sizes)
        with pytest.raises(ValueError, match=message):
            linear_attention(*arrays, **named, implementation="pallas_gpu", chunk=chunk)

    call(r"q\.dtype is float32: .* bfloat16 or float16", jnp.float32)
    call(r"v .* head dimensions of at most 256", hv=264)
    call(r"chunk=32: .* expects one of", chunk=32)


@off_gpu
def test_kernels_are_called():
    """One for the states and one for what is found; backward one more for q, k and v each."""
    arrays = static_gpu.linear_arguments("mlstm", 256, 64)
    with dispatch.compiling_for("cuda"):
        for function, count in ((static_gpu.linear_outputs, 2), (static_gpu.linear_gradients, 6)):
            traced = jax.jit(function).trace(*arrays)
            program = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert program.count("custom_call @mosaic_gpu") == count


@with_plugin
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("recurrence", static_gpu.RECURRENCES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiles_for_an_h200(recurrence, head_dim):
    """Nothing of the forward kernels lies outside registers, up to a head dimension of 128."""
    rows = static_gpu.linear_rows([head_dim], recurrences=[recurrence])
    assert len(rows) >= 4
    for row in rows:
        assert row.wgmma > 0
        assert row.shared <= 227 * 1024
        if head_dim < 256 and row.kernel.split()[1] in ("linear_states", "linear_outputs"):
            assert row.spilled == 0, row


@with_plugin
@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["mlstm", "kda"])
def test_memory_is_linear(recurrence):
    used = []
    for T in (4096, 16384):
        arrays = static_gpu.linear_arguments(recurrence, T, 128, static_gpu.h200())
        with dispatch.compiling_for("cuda"):
            compiled = jax.jit(static_gpu.linear_gradients).lower(*arrays).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    assert used[1] < 6 * used[0]  # 16 times, were it quadratic


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize(("head_dim", "chunk"), [(64, 64), (64, 512), (128, 128), (256, 64)])
def test_on_gpu(recurrence, head_dim, chunk):
    agree(recurrence, 1000, chunk, H=4, hk=head_dim, hv=head_dim, initial=True)
