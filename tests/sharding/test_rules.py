"""The table of axes: partitions, refusals, and functions of each device's own part."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding import rules
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, stream=2, tensor=2))


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def test_partition_follows_the_table():
    spec = rules.partition_spec(("batch", "streams", None, "heads", "head_dim"))
    assert spec == PartitionSpec(("data", "fsdp"), "stream", None, "tensor", None)
    assert rules.partition_spec(()) == PartitionSpec()


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'tensor'"):
        rules.partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'fsdp'"):
        rules.partition_spec(("batch", "embed"))
    with pytest.raises(KeyError):
        rules.partition_spec(("colour",))


def test_indivisible_dimension_names_array_axis_and_size(mesh):
    rules.check_divisible("q", (8, 4), ("embed", "heads"), mesh)
    with pytest.raises(InputError, match=r"q: axis 'heads' of size 3 .* over 2 devices"):
        rules.check_divisible("q", (8, 3), ("embed", "heads"), mesh)


def test_named_sharding_splits_an_array(mesh):
    x = jax.device_put(jnp.zeros((4, 6)), rules.named_sharding(mesh, "batch", "heads"))
    assert x.addressable_shards[0].data.shape == (2, 3)


def test_nothing_happens_without_a_mesh():
    x = jnp.ones((3, 5))
    assert not rules.is_sharded()
    assert rules.constrain(x, "batch", "streams") is x
    assert rules.shard_call(jnp.sin, (("batch", None),), ("batch", None)) is jnp.sin


def test_nothing_happens_on_one_device():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert not rules.is_sharded()


def test_constrain_lays_out_by_logical_axes(mesh):
    with jax.set_mesh(mesh):
        assert rules.is_sharded()
        y = jax.jit(lambda x: rules.constrain(x + 1, "batch", "streams", None))(
            jnp.zeros((4, 2, 3))
        )
    assert y.sharding.is_equivalent_to(rules.named_sharding(mesh, "batch", "streams", None), 3)


def test_shard_call_equals_the_function_on_whole_arrays(mesh):
    """A tree of arguments, one of them absent, an axis that is not split, and gradients."""
    q = jax.random.normal(jax.random.key(0), (4, 2, 3, 2, 5))
    pair = Pair(jnp.arange(4.0), jnp.arange(2.0) + 1)
    weights = (jnp.full((2, 2), 2.0), jnp.full((2, 2), 3.0))
    shapes = []

    def function(q, pair, weights, absent):
        assert absent is None
        shapes.append(q.shape)
        assert not rules.is_sharded()
        q = rules.constrain(q, "batch", "streams", None, "heads", None)
        scale = (weights[0] * weights[1])[:, None, :, None]
        return q * scale * pair.first[:, None, None, None, None] + pair.second[:, None, None, None]

    axes = ("batch", "streams", None, "heads", None)
    streamwise = ("streams", "heads")
    in_axes = (axes, Pair(("batch",), ("streams",)), (streamwise, streamwise), None)

    def loss(q, weights):
        call = rules.shard_call(function, in_axes, axes)
        return jnp.sum(jnp.sin(call(q, pair, weights, None)))

    plain = jax.value_and_grad(loss, (0, 1))(q, weights)
    with jax.set_mesh(mesh):
        sharded = jax.jit(jax.value_and_grad(loss, (0, 1)))(q, weights)
    assert shapes[0] == (4, 2, 3, 2, 5)
    assert (2, 1, 3, 1, 5) in shapes
    # Sums over 120 float32 terms of order one, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, sharded
    )


def test_shard_call_moves_nothing_between_devices(mesh):
    axes = ("batch", "streams", None)
    with jax.set_mesh(mesh):
        function = jax.jit(rules.shard_call(lambda x: jnp.sin(x).reshape(-1, 3).reshape(x.shape),
                                            (axes,), axes))  # fmt: skip
        x = jax.device_put(jnp.ones((8, 4, 3)), rules.named_sharding(mesh, *axes))
        text = function.lower(x).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "permute", "all-reduce"))
