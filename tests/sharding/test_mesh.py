"""The mesh: sizes, the axis that takes what is left, and refusals."""

import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType

from sharding.mesh import AXES, MeshConfig, make_mesh, mesh_shape
from sharding.settings import InputError


def test_left_over_axis_takes_the_rest():
    assert mesh_shape(MeshConfig(), 8) == (8, 1, 1, 1, 1, 1)
    assert mesh_shape(MeshConfig(data=1, fsdp=-1, tensor=2), 8) == (1, 4, 1, 1, 1, 2)
    assert mesh_shape(MeshConfig(data=2, stream=2, tensor=2), 8) == (2, 1, 2, 1, 1, 2)


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(data=2, fsdp=2), 8, "data=2 x fsdp=2 takes 4 devices, but there are 8"),
        (MeshConfig(tensor=3), 8, "the fixed axes take 3 devices"),
        (MeshConfig(tensor=16), 8, "the fixed axes take 16 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, devices, message):
    with pytest.raises(InputError, match=message):
        mesh_shape(config, devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "at least 1"),
        ({"stream": -2}, "at least 1"),
        ({"fsdp": -1}, "only one axis may be -1"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**sizes)


def test_description_leaves_out_unused_axes():
    assert MeshConfig(data=2, tensor=4).describe() == "data=2 x tensor=4"
    assert MeshConfig(data=1).describe() == "data=1"


def test_mesh_has_six_auto_axes_and_every_device():
    mesh = make_mesh(MeshConfig(data=2, stream=2, tensor=2))
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 6
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_over_some_devices():
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    assert list(mesh.devices.flat) == jax.devices()[:2]


def test_configuration_is_read_without_jax():
    code = "import sys, parscale.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
