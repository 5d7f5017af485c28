"""Which implementation is traced for which platform."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention, dispatch, masks


def traced(dtype, implementation=None, head_dim=64):
    """The program of causal attention, as text."""
    q = jax.ShapeDtypeStruct((1, 1, 128, 2, head_dim), dtype)
    op = lambda q, k, v: attention(q, k, v, masks.causal(), implementation=implementation)
    return str(jax.make_jaxpr(op)(q, q, q))


def test_a_cpu_takes_the_tiles_of_xla_without_tracing_kernels():
    text = traced(jnp.float32)
    assert "platform_index" not in text
    assert "pallas_call" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpu_takes_its_kernel(dtype):
    with dispatch.compiling_for("tpu"):
        text = traced(dtype)
        other = traced(jnp.float16)
    assert "pallas_call" in text
    assert "platform_index" in text
    assert "pallas_call" not in other


def test_a_gpu_takes_its_kernel_for_what_it_can_take():
    kernel = "platform_index"  # the choice between it and XLA, made when lowering
    with dispatch.compiling_for("cuda"):
        assert kernel in traced(jnp.bfloat16)
        assert kernel not in traced(jnp.float32)
        assert kernel not in traced(jnp.bfloat16, head_dim=512)
        with pytest.raises(ValueError, match=r"q.dtype is float32"):
            traced(jnp.float32, "pallas_gpu")


def test_a_target_is_part_of_what_jit_remembers():
    traces = []

    @jax.jit
    def function(x):
        traces.append(dispatch.fits("pallas_tpu"))
        return x

    function(1.0)
    with dispatch.compiling_for("tpu"):
        function(1.0)
    function(1.0)
    assert traces == [False, True]


def test_what_cannot_run_is_refused():
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run here: it needs a TPU"):
        traced(jnp.float32, "pallas_tpu")
    with (
        dispatch.compiling_for("tpu"),
        pytest.raises(ValueError, match="'pallas_gpu' cannot run here: the target is 'tpu'"),
    ):
        traced(jnp.bfloat16, "pallas_gpu")
    with pytest.raises(ValueError, match="platform='gpu': expected 'tpu', 'cuda' or 'cpu'"):
        dispatch.compiling_for("gpu")
    with pytest.raises(ValueError, match="expected one of oracle, xla, pallas_tpu, pallas_gpu"):
        traced(jnp.float32, "palas")
