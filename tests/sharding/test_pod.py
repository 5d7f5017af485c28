"""Compiling for pods of TPUs: what a program needs, and what our model may communicate."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from parscale.config import Config, DataConfig
from parscale.pod_search import apart
from parscale.pod_step import compile_step
from sharding.mesh import MeshConfig
from sharding.pods.compilation import DoesNotFitError, compile_lowered, memory_of, pod_mesh
from sharding.pods.topologies import Topology, parse_topology
from sharding.settings import InputError

GiB = 2**30
SMALL = Topology("v5e", (2, 2))


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (28.54G) exceeds available HBM (15.75G).",
            (28.54 * GiB, 15.75 * GiB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 96.00M hbm.",
            (512.5 * 2**20, 96 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: out of memory", (None, None)),
    ],
)
def test_the_compilers_message_says_what_is_needed(message, memory):
    assert memory_of(message) == memory


def test_what_does_not_fit_is_told_in_gib_and_survives_a_process():
    error = pickle.loads(pickle.dumps(DoesNotFitError(20 * GiB, 15.75 * GiB)))
    assert str(error) == (
        "the program does not fit: the compiler needs 20.00 GiB on a chip, of which 15.75 GiB "
        "can be used"
    )
    assert "more memory than a chip has" in str(DoesNotFitError(None, None))


def test_a_mesh_that_does_not_fill_the_topology_is_refused_before_libtpu():
    with pytest.raises(InputError, match="takes 3 devices, but there are 4"):
        pod_mesh(SMALL, MeshConfig(data=1, fsdp=3))


def layers_and_too_much(topology):
    """Of five layers of products whose weights are gathered; and of one too large for a chip."""
    mesh = pod_mesh(topology, MeshConfig(data=1, fsdp=-1))
    on = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def lowered(rows):
        x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16, sharding=on("fsdp"))
        w = jax.ShapeDtypeStruct((5, 512, 512), jnp.bfloat16, sharding=on(None, "fsdp"))
        return jax.jit(layers, out_shardings=on("fsdp")).lower(x, w)

    needs = compile_lowered(lowered(4096), mesh)
    try:
        compile_lowered(lowered(2**30), mesh)
    except DoesNotFitError as error:
        return needs, error
    return needs, None


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "name",
    ["v5e:2x2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v6e-4", "tpu7x-8"))],
)
def test_a_program_is_compiled_for_chips_that_are_not_there(name):
    topology = parse_topology(name)
    parts = topology.device_count
    needs, error = apart(layers_and_too_much, topology)
    assert needs.arguments == 2 * (4096 + 5 * 512) * 512 // parts
    assert needs.outputs == 2 * 4096 * 512 // parts
    assert needs.peak >= needs.arguments + needs.outputs
    work = needs.work
    assert work.flops == 5 * 2 * 4096 * 512 * 512 // parts
    assert not work.unknown_loops
    assert work.cycles > 0
    # The weights of all layers, whether gathered in the loop or before it.
    assert work.bytes_over("fsdp", kind="all-gather") == 5 * 2 * 512 * 512
    assert work.bytes_over("fsdp") == work.bytes_over("fsdp", kind="all-gather")
    assert error.needed > error.available > 15 * GiB


SLOW = [pytest.mark.slow, pytest.mark.tpu_compile]

# The paper's width with few layers, heads that four devices can share, and a small vocabulary.
MODEL = ModelConfig(
    vocab_size=8192, width=1536, layers=2, heads=16, kv_heads=4, mlp_width=8320, streams=4,
    dtype="bfloat16", layer_loop="scan", remat="full",
)  # fmt: skip
DATA = DataConfig(length=1024, batch=4)
LAYER = 2 * (2 * 1536 * 1536 + 2 * 1536 * 384 + 3 * 1536 * 8320)
"""Bytes of a layer's matrices in bfloat16."""


def work_of(mesh: MeshConfig, topology="v5e:4x4", batch=4, **changes):
    model = dataclasses.replace(MODEL, **changes)
    config = Config(model=model, mesh=mesh, data=dataclasses.replace(DATA, batch=batch))
    return apart(compile_step, config, parse_topology(topology)).needs.work


class TestContracts:
    """What may go over which axis, in steps that libtpu compiled."""

    pytestmark = SLOW

    def test_streams_move_little_where_tensor_parallelism_moves_gigabytes(self):
        streams = work_of(MeshConfig(data=1, fsdp=4, stream=4))
        tensor = work_of(MeshConfig(data=1, fsdp=4, tensor=4))
        assert 0 < streams.bytes_over("stream") < 0.1 * GiB
        # Of the paper's 36 layers instead of two.
        assert tensor.bytes_over("tensor") * 36 / 2 > 2 * GiB
        assert tensor.bytes_over("tensor") > 2 * streams.bytes_over("stream")
        # Activations stay where they are: nothing but sums and gathers, and no exchange.
        assert not streams.bytes_over("stream", kind="all-to-all")
        # Each device has one stream of one row, and of the mixed row a fourth of the positions.
        # Forward, forward again but for the last product of a layer, and twice backward.
        layer = 8 * LAYER // 2 - 2 * 1536 * 8320
        mixing = 6 * 1024 * 1536 * 1536
        head = 8 * 1024 // 4 * 1536 * 8192
        assert streams.flops == pytest.approx(2 * 1024 * layer + mixing + head, rel=1e-3)

    def test_weights_are_gathered_and_not_summed(self):
        work = work_of(MeshConfig(data=1, fsdp=16), batch=16, streams=1)
        weights = 2 * LAYER
        # Forward and, recomputed, backward.
        assert work.bytes_over("fsdp", kind="all-gather") >= 1.9 * weights
        # Gradients at most once, where the compiler makes no reduce-scatter of their sum; those of
        # the embedding and of the head in float32.
        head = 2 * 4 * 8192 * 1536
        assert work.bytes_over("fsdp", kind="all-reduce") <= 1.1 * weights + head
        assert work.bytes_over("fsdp", kind="collective-permute") < 0.01 * weights

    def test_a_block_sums_twice_forward_under_tensor_parallelism(self):
        few, more = apart(forward_sums, 2), apart(forward_sums, 5)
        assert more - few == 2 * 3


def forward_sums(layers: int) -> int:
    """All-reduces over the tensor axis in a forward pass."""
    from pallas_kernels import dispatch
    from parscale.training import Training

    model = dataclasses.replace(MODEL, layers=layers, streams=1, remat="none")
    config = Config(model=model, mesh=MeshConfig(data=1, tensor=4), data=DATA)
    mesh = pod_mesh(SMALL, config.mesh)
    training = Training(config, mesh)
    with dispatch.compiling_for("tpu"), jax.set_mesh(mesh):
        ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
        forward = jax.jit(lambda state, ids: training.model(state).run_streams(ids)[0])
        lowered = forward.lower(training.abstract, ids)
    return compile_lowered(lowered, mesh).work.count_over("tensor", kind="all-reduce")
