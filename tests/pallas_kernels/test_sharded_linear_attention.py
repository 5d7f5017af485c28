"""Linear attention over 8 devices: rows, streams and heads, each device on its own."""

import functools

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec
from linear_cases import arguments, errors

from pallas_kernels import linear_attention, sharded_linear_attention

HEADS = Spec("data", "stream", None, "tensor", None)
MOVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "stream", "tensor"), (AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("recurrence", "initial"),
    [("gated_delta_net", True), pytest.param("mlstm", False, marks=pytest.mark.slow)],
)
def test_equals_linear_attention_on_whole_arrays(mesh, recurrence, initial):
    """With gradients; that of the state documents start from is summed over all devices' rows."""
    arrays, named = arguments(recurrence, T=40, initial=initial)
    ids = named.pop("segment_ids")
    op = functools.partial(sharded_linear_attention, q_spec=HEADS, v_spec=HEADS, mesh=mesh)

    def value(op, arrays, named):
        normalize = recurrence == "mlstm"
        out, state = op(*arrays, **named, segment_ids=ids, normalize=normalize)
        loss = sum((x**2).sum() for x in jax.tree.leaves((out, state)))
        return loss, {"out": out, "state": state}

    results = [
        jax.jit(jax.value_and_grad(functools.partial(value, f), (0, 1), has_aux=True))(
            arrays, named
        )
        for f in (linear_attention, op)
    ]
    (one, gradients), (other, other_gradients) = ((x[0][1], x[1]) for x in results)
    assert max(errors(other, one).values()) < 1e-6
    pairs = zip(*map(jax.tree.leaves, (other_gradients, gradients)), strict=True)
    assert max(errors({"": x}, {"": y})[""] for x, y in pairs) < 1e-5


def test_nothing_moves_forward(mesh):
    arrays, named = arguments("kda", T=40)
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    arrays = [put(x, HEADS) for x in arrays]
    specs = {
        "log_decay": HEADS,
        "beta": Spec("data", "stream", None, "tensor"),
        "segment_ids": Spec("data"),
        "restart_state": Spec("stream", "tensor"),
    }
    named = {name: put(x, specs[name]) for name, x in named.items()}
    op = functools.partial(sharded_linear_attention, q_spec=HEADS, v_spec=HEADS, mesh=mesh)
    text = jax.jit(op).lower(*arrays, **named).compile().as_text()
    assert not [name for name in MOVES if name in text]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"q_spec": HEADS, "v_spec": Spec("data", "stream", None, None, None)}, "same entries"),
        ({"q_spec": Spec("data"), "v_spec": HEADS}, "expected 5 entries"),
        ({"q_spec": Spec(None, None, "data", None, None), "v_spec": HEADS}, "expected 5 entries"),
    ],
)
def test_bad_specs(mesh, specs, message):
    arrays, named = arguments("plain", T=8)
    with pytest.raises(ValueError, match=message):
        sharded_linear_attention(*arrays, **named, mesh=mesh, **specs)
