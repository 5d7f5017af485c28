"""The table of axes: partitions and refusals."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sharding import rules
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, stream=2, tensor=2))


def test_partition_follows_the_table():
    spec = rules.partition_spec(("batch", "streams", None, "heads", "head_dim"))
    assert spec == PartitionSpec(("data", "fsdp"), "stream", None, "tensor", None)
    assert rules.partition_spec(()) == PartitionSpec()


def test_two_axes_on_one_mesh_axis_are_refused_by_name():
    with pytest.raises(ValueError, match=r"w: its axes 'heads' and 'mlp' .* mesh axis 'tensor'"):
        rules.partition_spec(("heads", "embed", "mlp"), "w")
    with pytest.raises(ValueError, match=r"'batch' and 'embed' .* mesh axis 'fsdp'"):
        rules.partition_spec(("batch", "embed"))
    with pytest.raises(ValueError, match="'heads' and 'heads'"):
        rules.partition_spec(("heads", "heads"))


def test_an_unknown_axis_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"w has an axis 'head'.*did you mean \"heads\""):
        rules.partition_spec(("embed", "head"), "w")


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
