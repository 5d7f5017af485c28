"""Tensor-parallel partitions without logical axes: those that we wrote by hand, and their sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models.config import ModelConfig
from models.transformer import LanguageModel
from sharding import rules
from sharding.automatic import tensor_parallel_specs
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError

MODEL = ModelConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, tied_embeddings=False
)


def of_tensor(spec: PartitionSpec) -> tuple[int, ...]:
    """The dimensions on mesh axis `tensor`."""
    return tuple(i for i, entry in enumerate(spec) if entry == "tensor")


def test_our_own_model_gets_the_partition_written_by_hand():
    abstract = nnx.state(nnx.eval_shape(lambda: LanguageModel(MODEL, rngs=nnx.Rngs(0))))
    by_rule = tensor_parallel_specs(nnx.to_pure_dict(abstract), 2, stacked="layers")
    weights = nnx.to_flat_state(abstract)
    assert len(weights) > 10
    for path, weight in weights:
        found = by_rule
        for word in path:
            found = found[word]
        assert of_tensor(found) == of_tensor(rules.partition_spec(weight.axes)), path


def test_names_of_a_pytorch_state_dict():
    layer = {
        "self_attn.q_proj": (32, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 32), "mlp.gate_proj": (48, 16), "mlp.up_proj": (48, 16),
        "mlp.down_proj": (16, 48), "input_layernorm": (16,),
    }  # fmt: skip
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16)}
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    specs = tensor_parallel_specs(arrays, 4, outputs_first=True)
    inner = ("o_proj", "down_proj")
    for name, spec in specs.items():
        if "layernorm" in name:
            assert spec == PartitionSpec()
        else:
            assert of_tensor(spec) == ((1,) if any(word in name for word in inner) else (0,)), name


def test_matrices_without_known_names_take_turns_and_pairs_need_one_sum():
    rng = np.random.default_rng(0)
    params = {f"step{i}": {"kernel": rng.normal(size=(16, 16))} for i in range(4)}
    specs = tensor_parallel_specs(params, 2)
    assert [of_tensor(specs[f"step{i}"]["kernel"]) for i in range(4)] == [(1,), (0,), (1,), (0,)]
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x.astype(np.float32), NamedSharding(mesh, spec)),
        params,
        specs,
    )

    def chain(params, x):
        for i in range(4):
            x = jnp.tanh(x @ params[f"step{i}"]["kernel"])
        return x

    whole = NamedSharding(mesh, PartitionSpec())
    x = rng.normal(size=(8, 16)).astype(np.float32)
    compiled = jax.jit(chain, out_shardings=whole).lower(placed, x).compile()
    text = compiled.as_text()
    assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == 2
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    expected = x.astype(np.float64)
    for i in range(4):
        expected = np.tanh(expected @ params[f"step{i}"]["kernel"])
    # Sums of 16 products in float32, four times.
    np.testing.assert_allclose(compiled(placed, x), expected, atol=1e-5)


def test_known_names_reset_whose_turn_it_is():
    shapes = {"first": (4, 4), "down": (4, 4), "second": (4, 4), "third": (4, 4)}
    specs = tensor_parallel_specs({name: np.zeros(shape) for name, shape in shapes.items()}, 2)
    assert [of_tensor(spec) for spec in specs.values()] == [(1,), (0,), (1,), (0,)]


def test_what_does_not_divide_is_named():
    shapes = {"layers": {"attention": {"q": np.zeros((2, 16, 6, 4))}}}
    with pytest.raises(InputError, match=r"layers\.attention\.q: axis 2 of size 6 .* 4 devices"):
        tensor_parallel_specs(shapes, 4, stacked="layers")
