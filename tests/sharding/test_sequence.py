"""The choice of a scheme: by the configuration, by sizes, and what cannot be."""

import re

import jax
import jax.numpy as jnp
import pytest
from sequence_cases import on_mesh, spec

from pallas_kernels import masks
from sharding import sequence
from sharding.mesh import MeshConfig
from sharding.sequence.attention import sequence_attention
from sharding.sequence.linear import sequence_linear_attention
from sharding.settings import InputError

SMALL, LARGE = 2**20, 2**40


def choice(parts=4, tensor=1, heads=16, kv_heads=2, length=4096, gathered=SMALL):
    return sequence.attention_scheme(parts, tensor, heads, kv_heads, length, gathered)


@pytest.mark.parametrize(
    ("scheme", "sizes"),
    [
        ("heads", {"kv_heads": 4}),
        ("heads", {"kv_heads": 8, "tensor": 2, "gathered": LARGE}),
        ("gather", {"kv_heads": 4, "tensor": 2}),
        ("gather", {"kv_heads": 2}),
        ("gather", {"gathered": sequence.GATHERED_BYTES}),
        ("ring", {"gathered": sequence.GATHERED_BYTES + 1}),
        ("gather", {"gathered": LARGE, "length": 4 * 1023}),
    ],
)
def test_auto_chooses_by_sizes(scheme, sizes):
    assert choice(**sizes) == scheme


def test_what_is_said_is_taken():
    for scheme in ("gather", "heads", "ring"):
        with sequence.using(attention=scheme):
            assert choice(kv_heads=4, gathered=LARGE) == scheme
    for parts, state in ((2, "gather"), (8, "gather"), (16, "steps")):
        assert sequence.state_scheme(parts) == state
    with sequence.using(state="steps"):
        assert sequence.state_scheme(2) == "steps"
    assert sequence.schemes() == sequence.Schemes()


def test_gathered_bytes_are_of_one_device():
    """128K tokens of two streams with 8 heads of 128 in bfloat16: the bound itself."""
    assert sequence.gathered_bytes((1, 2, 2**17, 8, 128), 2, 1) == sequence.GATHERED_BYTES
    assert sequence.gathered_bytes((1, 2, 2**17, 8, 128), 2, 4) == sequence.GATHERED_BYTES // 4


def test_a_function_traced_for_one_scheme_is_not_used_for_another():
    x = jax.ShapeDtypeStruct((1, 1, 8, 2, 4), jnp.float32)
    function = jax.jit(
        lambda x: sequence_attention(x, x, x, masks.causal(), q_spec=spec(), kv_spec=spec())
    )
    found = {}
    for scheme in ("gather", "heads", "ring"):
        with on_mesh(attention=scheme, sequence=2):
            text = function.lower(x).as_text()
        moves = re.findall(r"stablehlo\.(all_gather|all_to_all|collective_permute)", text)
        found[scheme] = set(moves)
    assert found == {
        "gather": {"all_gather"}, "heads": {"all_to_all"}, "ring": {"collective_permute"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "heads", "length", "message"),
    [
        ("heads", (6, 6), 16, "6 query heads and 6 key/value heads: expected both to divide over "
         "sequence=4 x tensor=1 devices; .*=gather or ring"),
        ("heads", (8, 2), 16, "8 query heads and 2 key/value heads"),
        ("ring", (4, 4), 12, "12 positions: expected a multiple of 8, .*=gather"),
        ("gather", (4, 4), 10, "10 positions on a mesh with sequence=4: expected a multiple of 4"),
        ("auto", (4, 4), 10, "10 positions on a mesh with sequence=4: expected a multiple of 4"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(scheme, heads, length, message):
    q, k = (jax.ShapeDtypeStruct((1, 1, length, n, 4), jnp.float32) for n in heads)
    with on_mesh(attention=scheme, sequence=4), pytest.raises(InputError, match=message):
        jax.eval_shape(
            lambda q, k: sequence_attention(q, k, k, masks.full(), q_spec=spec(), kv_spec=spec()),
            q, k,
        )  # fmt: skip


def test_positions_of_a_recurrence_divide():
    x = jax.ShapeDtypeStruct((1, 1, 10, 2, 4), jnp.float32)
    with on_mesh(sequence=4), pytest.raises(InputError, match="10 positions on a mesh"):
        jax.eval_shape(
            lambda x: sequence_linear_attention(x, x, x, q_spec=spec(), v_spec=spec()), x
        )


def test_configuration():
    config = MeshConfig(sequence=2, sequence_attention="ring", sequence_state="steps")
    assert config.describe() == "data=-1 x sequence=2"
    with pytest.raises(InputError, match=r"sequence_attention='rings'.*did you mean \"ring\""):
        MeshConfig(sequence_attention="rings")
    with pytest.raises(InputError, match="sequence_state='ring': expected one of auto, gather"):
        MeshConfig(sequence_state="ring")


def test_parts_of_the_ambient_mesh():
    assert sequence.parts() == 1
    with on_mesh(sequence=4):
        assert sequence.parts() == 4
    with on_mesh(data=4):
        assert sequence.parts() == 1
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert sequence.parts() == 1
