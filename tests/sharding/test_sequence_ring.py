"""The zigzag of the ring: its permutations, the work of each device, and what overlaps on TPU."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec
from sequence_cases import on_mesh

from pallas_kernels import masks
from sharding.pods import topologies
from sharding.sequence import ring


@pytest.mark.parametrize("parts", range(2, 18))
def test_halves_are_exchanged_by_permutations(parts):
    """Every device sends and receives one even and one odd chunk: its two."""
    for odd in (0, 1):
        senders, receivers = zip(*ring._route(parts, odd), strict=True)
        assert sorted(senders) == sorted(receivers) == list(range(parts))
    taken = {device: [] for device in range(parts)}
    for chunk in range(2 * parts):
        taken[ring.owner(chunk, parts)].append(chunk)
    for device, chunks in taken.items():
        assert chunks == [ring.chunk_of(half, device, parts) for half in (ring.LOW, ring.HIGH)]
        assert sum(chunk % 2 for chunk in chunks) == 1


@pytest.mark.parametrize("parts", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_zigzag_and_back(parts):
    x = jnp.arange(4 * parts)

    def both(x):
        halves = ring.to_zigzag(x, parts, 0)
        return halves, ring.from_zigzag(halves, parts, 0)

    with on_mesh(sequence=parts):
        halves, back = jax.jit(
            jax.shard_map(
                both,
                in_specs=Spec("sequence"),
                out_specs=(Spec(None, "sequence"), Spec("sequence")),
                check_vma=False,
            )
        )(x)
    np.testing.assert_array_equal(back, x)
    low, high = np.asarray(halves).reshape(2, parts, 2)
    np.testing.assert_array_equal(low.ravel(), x[: 2 * parts])
    np.testing.assert_array_equal(high[::-1].ravel(), x[2 * parts :])


def visited(parts, causal):
    """For each step and device, the pairs of chunks of queries and of keys that it computes."""
    steps = []
    for step in range(parts):
        steps.append([])
        for device in range(parts):
            pairs = ring.pairs(step, device, parts, causal) if step else ring.own_pairs(causal)
            keys_of = (device - step) % parts
            steps[-1].append(
                [
                    (ring.chunk_of(a, device, parts), ring.chunk_of(b, keys_of, parts))
                    for a, b in pairs
                ]
            )
    return steps


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_every_visible_pair_is_computed_once_and_work_is_equal(parts):
    """Pairs of positions that see each other, counted; those of whole chunks cost as many."""
    size = 6
    visible = np.asarray(masks.dense(masks.causal(), 2 * parts * size, 2 * parts * size))
    seen = np.zeros(visible.shape, int)
    work = np.zeros((parts, parts), int)
    for step, devices in enumerate(visited(parts, causal=True)):
        for device, pairs in enumerate(devices):
            for a, b in pairs:
                block = np.s_[a * size : (a + 1) * size, b * size : (b + 1) * size]
                seen[block] += 1
                work[step, device] += np.sum(visible[block])
    assert np.all(seen[visible] == 1)
    assert seen.max() == 1
    assert np.all(work == work[:, :1])
    assert np.all(work[1:] == 2 * size**2)
    # Chunks above the diagonal are not computed at all.
    assert seen.sum() == (2 * parts + 1) * parts * size**2


@pytest.mark.parametrize("parts", [2, 5])
def test_all_pairs_are_computed_once_without_causality(parts):
    chunks = [pair for step in visited(parts, False) for pairs in step for pair in pairs]
    assert sorted(chunks) == [(a, b) for a in range(2 * parts) for b in range(2 * parts)]


PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from pallas_kernels import dispatch, masks
from sharding import rules, sequence
from sharding.mesh import AXES
from sharding.sequence.attention import sequence_attention

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
grid = np.array(topology.devices).reshape(1, 1, 1, 1, 4, 1)
mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 6)
spec = rules.partition_spec(("batch", "streams", "length", "heads", None))
prefix_spec = jax.sharding.PartitionSpec()
def like(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
q, k, v = (like((1, 2, 8192, heads, 128), spec) for heads in (8, 2, 2))
prefix = (like((2, 2, 48, 128), prefix_spec),) * 2
def loss(q, k, v, prefix):
    out = sequence_attention(q, k, v, masks.causal(), prefix=prefix, q_spec=spec, kv_spec=spec)
    return jnp.sum(out.astype(jnp.float32) ** 2)
with jax.set_mesh(mesh), sequence.using(attention="ring"), dispatch.compiling_for("tpu"):
    print(jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, k, v, prefix).compile().as_text())
"""


@pytest.fixture(scope="module")
def tpu_program():
    """The text of the compiled forward and backward ring over 4 chips."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | topologies.LIBTPU,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_permutes_overlap_kernels_on_tpu(tpu_program):
    """In the loops over devices, a kernel stands between start and end of everything passed on:
    forward keys and values, backward their gradients too."""
    overlapped = []
    for computation in tpu_program.split("\n\n"):
        lines = computation.strip().splitlines()
        if not lines or lines[0].startswith(("ENTRY", "HloModule")):
            continue
        started = {}
        for place, line in enumerate(lines):
            if " collective-permute-start(" in line:
                started[line.split()[0]] = place
            if " collective-permute-done(" in line:
                start = re.search(r"collective-permute-done\([^%]*(%[\w.-]+)", line).group(1)
                between = lines[started[start] + 1 : place]
                overlapped.append(any("tpu_custom_call" in x for x in between))
    assert overlapped == [True] * 6


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_no_device_gathers_keys_on_tpu(tpu_program):
    """All 8192 positions of 2 heads exist nowhere, in any layout."""
    assert " all-gather" not in tpu_program
    assert not re.search(r"bf16\[[\d,]*\b8192\b", tpu_program)
