"""The reader of compiled programs, on programs whose work is known."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.pods import hlo, hlo_groups
from sharding.pods.hlo_text import parse, parse_shapes

ONE = {"data": 1}


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


@functools.cache
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    def function(x, w):
        def outer(x, _):
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
            return jnp.sin(x @ w[0]), None

        return jax.lax.scan(outer, x, length=11)[0]

    work = hlo.read(compiled(function, floats(16, 32), floats(7, 32, 32)), ONE)
    assert work.flops == 11 * (7 + 1) * 2 * 16 * 32 * 32
    assert work.collectives == work.unknown_loops == ()


def test_a_loop_counts_from_where_it_starts():
    def body(state):
        step, x = state
        return step + 3, x @ x

    def function(x):
        return jax.lax.while_loop(lambda state: state[0] < 20, body, (jnp.int32(4), x))[1]

    # Counters 4, 7, 10, 13, 16 and 19.
    assert hlo.read(compiled(function, floats(8, 8)), ONE).flops == 6 * 2 * 8**3


def test_a_loop_that_ends_by_its_data_is_told_and_counted_once():
    def function(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 2.0, lambda x: x @ x, x)

    work = hlo.read(compiled(function, floats(8, 8)), ONE)
    assert work.flops == 2 * 8**3
    assert len(work.unknown_loops) == 1


def test_batched_products_count_each_of_the_batch():
    work = hlo.read(
        compiled(lambda x, y: jnp.einsum("bik,bjk->bij", x, y), floats(5, 6, 7), floats(5, 8, 7)),
        ONE,
    )
    assert work.flops == 2 * 5 * 6 * 8 * 7


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": ((0, 2), (3, 1))},
        {"window_strides": (1, 2), "padding": ((0, 1), (2, 0)), "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": ((4, 4), (0, 0)), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_a_convolution_counts_what_a_convolution_of_ones_adds_up(options):
    groups = options.get("feature_group_count", 1)
    x, kernel = np.ones((3, 4, 9, 8), np.float32), np.ones((6, 4 // groups, 3, 2), np.float32)
    function = functools.partial(jax.lax.conv_general_dilated, **options)
    text = jax.jit(function).lower(x, kernel).as_text(dialect="hlo")
    assert hlo.read(text, ONE).flops == 2 * np.asarray(function(x, kernel)).sum()


COLLECTIVES = {
    # kind: what makes it, partitions of input and result, bytes of its result on a device
    "all-reduce": (lambda x, a: jax.lax.psum(x, a), P("data", "tensor"), 4 * 16 * 8),
    "all-gather": (
        lambda x, a: jax.lax.all_gather(x, a, axis=1, tiled=True), P("data", None), 4 * 16 * 32
    ),
    "reduce-scatter": (
        lambda x, a: jax.lax.psum_scatter(x, a, scatter_dimension=1, tiled=True),
        P("data", "tensor"), 4 * 16 * 2,
    ),
    "all-to-all": (
        lambda x, a: jax.lax.all_to_all(x, a, 0, 1, tiled=True), P("data", "tensor"), 4 * 16 * 8
    ),
    "collective-permute": (
        lambda x, a: jax.lax.ppermute(x, a, [(i, (i + 1) % 4) for i in range(4)]),
        P("data", "tensor"), 4 * 16 * 8,
    ),
}  # fmt: skip
RECEIVED = {
    "all-reduce": 2 * 4 * 16 * 8 * 3 / 4,
    "all-gather": 4 * 16 * 8 * 3,
    "reduce-scatter": 4 * 16 * 2 * 3,
    "all-to-all": 4 * 16 * 8 * 3 / 4,
    "collective-permute": 4 * 16 * 8,
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_counts_its_result_over_its_axis_in_every_turn_of_a_loop(kind):
    make, out, size = COLLECTIVES[kind]

    def body(x):
        # The sum keeps every turn alive and different from the others.
        def turn(total, scale):
            return total + jnp.sum(make(jnp.sin(x * scale), "tensor"), keepdims=True), None

        return jax.lax.scan(turn, jnp.zeros((1, 1)), jnp.arange(6.0))[0]

    spread = jax.shard_map(
        body, mesh=mesh(), in_specs=P("data", "tensor"), out_specs=P("data", "tensor"),
        check_vma=False,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh(), out))
    work = hlo.read(compiled(spread, x), dict(mesh().shape))
    (found,) = (one for one in work.collectives if one.kind == kind)
    assert found.axes == ("tensor",)
    assert found.size == (2 if kind == "collective-permute" else 4)
    assert (found.count, found.bytes) == (6, 6 * size)
    assert found.traffic == 6 * RECEIVED[kind]
    assert work.bytes_over("tensor", kind=kind) == 6 * size
    assert work.bytes_over("data") == 0


def test_a_product_sharded_over_what_it_sums_is_reduced_over_both_axes():
    at = lambda *axes: NamedSharding(mesh(), P(*axes))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=at(None, ("data", "tensor")))
    w = jax.ShapeDtypeStruct((64, 24), jnp.float32, sharding=at(("data", "tensor"), None))
    text = compiled(jnp.matmul, x, w, out_shardings=at())
    work = hlo.read(text, dict(mesh().shape))
    assert work.flops == 2 * 16 * 24 * 64 // 8
    (found,) = work.collectives
    assert (found.kind, found.axes, found.size) == ("all-reduce", ("data", "tensor"), 8)
    assert found.bytes == 4 * 16 * 24


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'y'}", [[0, 1], [2, 3]]),
        ("mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
        ("mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", [[3, 1], [2, 0]]),
    ],
)
def test_groups_of_devices_in_every_form(text, rows):
    assert hlo_groups.groups(text, 4).tolist() == rows


def test_groups_in_another_form_are_refused():
    with pytest.raises(ValueError, match=r"replica_groups=<0,1>"):
        hlo_groups.groups("<0,1>", 2)


@pytest.mark.parametrize(
    ("rows", "axes"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], ("stream",)),
        ([[0, 4], [1, 5]], ("fsdp",)),
        ([[0, 5]], ("fsdp", "stream")),
        ([[0, 0], [5, 5]], ()),
    ],
)
def test_the_axes_of_a_group_are_those_its_devices_differ_in(rows, axes):
    assert hlo_groups.axes_of(np.array(rows), {"fsdp": 2, "tensor": 1, "stream": 4}) == axes


# As libtpu prints it: a gather spread over three fusions, a sum that only a part is kept of, and a
# sum over slices, which goes through the hosts; all in a loop of five turns.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[16,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %place = s32[] constant(16)
  ROOT %part = bf16[16,32]{1,0} dynamic-slice(%all-reduce.1, %place, %place), dynamic_slice_sizes={16,32}
}

%begin (shard: bf16[16,32]) -> (bf16[16,32], bf16[64,32], u32[]) {
  %shard = bf16[16,32]{1,0} parameter(0)
  %all-gather.1 = bf16[64,32]{1,0} all-gather(%shard), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[16,32]{1,0}, bf16[64,32]{1,0:S(1)}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (shard.1: bf16[16,32], x.1: bf16[8,32], w.1: bf16[32,32]) -> bf16[8,32] {
  %shard.1 = bf16[16,32]{1,0} parameter(0)
  %x.1 = bf16[8,32]{1,0} parameter(1)
  %w.1 = bf16[32,32]{1,0} parameter(2)
  %all-gather.2 = bf16[64,32]{1,0} all-gather(%shard.1), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %product = bf16[8,32]{1,0} convolution(%x.1, %w.1), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[16,32], bf16[8,32], bf16[32,32])) -> (s32[], bf16[16,32], bf16[8,32], bf16[32,32]) {
  %state = (s32[], bf16[16,32]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %s = bf16[16,32]{1,0} get-tuple-element(%state), index=1
  %a = bf16[8,32]{1,0} get-tuple-element(%state), index=2
  %w = bf16[32,32]{1,0} get-tuple-element(%state), index=3
  %fusion.1 = (bf16[16,32]{1,0}, bf16[64,32]{1,0:S(1)}, u32[]{:S(2)}) fusion(%s), kind=kCustom, calls=%begin
  %fusion.2 = bf16[8,32]{1,0} fusion(%s, %a, %w), kind=kCustom, calls=%go_on, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %whole = bf16[64,32]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"9223372036854775807","text":"several
lines = (of it
"}
  %fusion.3 = bf16[16,32]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"window_config":{"estimated_cycles":"24"}}
  %token = token[] after-all()
  %send = (bf16[4,8]{1,0}, u32[], token[]) send(%a, %token), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = (s32[], bf16[16,32]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) tuple(%next, %fusion.3, %fusion.2, %w)
}

%condition (state.1: (s32[], bf16[16,32], bf16[8,32], bf16[32,32])) -> pred[] {
  %state.1 = (s32[], bf16[16,32]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (p0: bf16[16,32], p1: bf16[8,32], p2: bf16[32,32]) -> bf16[8,32] {
  %p0 = bf16[16,32]{1,0} parameter(0)
  %p1 = bf16[8,32]{1,0} parameter(1)
  %p2 = bf16[32,32]{1,0} parameter(2)
  %two = s32[] constant(2)
  %first = s32[] copy(%two)
  %tuple = (s32[], bf16[16,32]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) tuple(%first, %p0, %p1, %p2)
  %while = (s32[], bf16[16,32]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[8,32]{1,0} get-tuple-element(%while), index=2
}
"""  # noqa: E501


def parts_as_operands(text):
    """The program as newer XLA prints it: `%tuple#2` in place of an instruction that takes it."""
    for line, name, whole, index in re.findall(
        r"(^  %(\S+) = .* get-tuple-element\(%(\S+)\), index=(\d)\n)", text, re.MULTILINE
    ):
        text = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{whole}#{index}", text.replace(line, ""))
    return text


@pytest.mark.parametrize("text", [TPU, parts_as_operands(TPU)], ids=["parts", "operands"])
def test_a_program_as_the_tpu_compiler_prints_it(text):
    work = hlo.read(text, {"data": 4, "fsdp": 4}, slices=2)
    assert work.flops == 5 * 2 * 8 * 32 * 32
    assert work.cycles == 5 * 1024
    assert work.kernels == 5
    found = {one.kind: one for one in work.collectives}
    assert len(found) == len(work.collectives) == 3
    gather, scatter, slices = (
        found["all-gather"], found["reduce-scatter"], found["host-transfer"],
    )  # fmt: skip
    assert (gather.axes, gather.size, gather.count) == (("fsdp",), 4, 5)
    assert gather.bytes == 5 * 2 * 64 * 32
    assert (scatter.axes, scatter.size, scatter.count) == (("fsdp",), 4, 5)
    assert scatter.bytes == 5 * 2 * 16 * 32
    assert (slices.axes, slices.is_dcn, slices.bytes) == ((), True, 5 * 2 * 4 * 8)
    assert not work.unknown_loops


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        parse("module @jit_f {\n}\n")


def test_sizes_of_types():
    shapes = parse_shapes(
        "(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[3], pred[<=4], token[], c64[2], u32[])"
    )
    assert [shape.bytes for shape in shapes] == [12, 2, 4, 0, 16, 4]
    assert math.prod(shapes[0].dims) == 6
