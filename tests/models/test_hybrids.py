"""Models of several mixers: stacks, documents, windows, streams, meshes, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import SMALL, forward, make_model, random_ids, run_streams

from models import huggingface
from models.config import MIXERS, RECURRENT, ModelConfig
from models.growth import begin_from, check_growable
from models.transformer import LanguageModel
from models.weights import TransformParam, abstract_weights
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError

LENGTH = 8  # up to which the recurrence itself is computed, which compiles fastest
HYBRID = dataclasses.replace(SMALL, mixers=("gla", "attention"), layers=4, layer_loop="scan")


def test_scanned_and_unstacked_layers_give_the_same():
    ids = random_ids(HYBRID, 2, LENGTH)
    scanned = make_model(HYBRID)
    expected = forward(scanned, ids)
    unstacked = scanned.unstack()
    np.testing.assert_allclose(forward(unstacked, ids), expected, rtol=1e-5, atol=1e-5)
    names = [type(layer.mixer).__name__ for layer in unstacked.layers]
    assert names == ["GatedLinearAttention", "Attention"] * 2


def test_a_stack_for_each_place_and_the_plain_names_without_a_pattern():
    def names(config):
        model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        return nnx.to_pure_dict(nnx.state(model))["layers"]

    layers = names(HYBRID)
    assert list(layers) == ["0_gla", "1_attention"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(layers)} == {2}
    plain = names(SMALL)
    assert plain.keys() == {"mixer", "mixer_norm", "mlp", "mlp_norm"}
    assert plain["mixer"].keys() == {
        "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "streams",
    }  # fmt: skip


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0]], np.int32)


@pytest.mark.parametrize(
    ("mixers", "transform"),
    [
        (("kda", "aaren"), "prefix"),
        pytest.param(("gated_delta_net",), "soft_tokens", marks=pytest.mark.slow),
        pytest.param(("window", "gla"), "low_rank", marks=pytest.mark.slow),
        pytest.param(("mlstm_exp", "mlstm_sigmoid"), "prefix", marks=pytest.mark.slow),
        pytest.param(("delta_net", "kda"), "soft_tokens", marks=pytest.mark.slow),
        pytest.param(("aaren", "retention"), "soft_tokens", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_are_computed_as_if_alone(mixers, transform):
    config = dataclasses.replace(
        SMALL, mixers=mixers, layers=len(mixers), transform=transform, window=3
    )
    model = make_model(config)
    first, second = random_ids(config, 1, 3), random_ids(config, 1, 4, seed=1)
    row = np.concatenate([first, second, np.zeros((1, 1), np.int32)], 1)
    packed = forward(model, row, segment_ids=SEGMENTS, positions=POSITIONS)
    assert np.isfinite(packed).all()
    alone = np.concatenate([forward(model, first), forward(model, second)], 1)
    np.testing.assert_allclose(packed[:, :7], alone, rtol=1e-5, atol=2e-5)


def test_a_window_is_what_its_width_says():
    config = dataclasses.replace(SMALL, mixers=("window",), window=3, layers=1, streams=1)
    graph, params = nnx.split(make_model(config))
    params = nnx.to_pure_dict(params)
    ids = np.arange(9, dtype=np.int32)[None]

    def read(embedding):
        logits = nnx.merge(graph, params | {"embedding": embedding})(ids)
        return logits[0, 6] @ jnp.asarray(np.random.default_rng(0).normal(size=31), jnp.float32)

    gradient = np.abs(np.asarray(jax.jit(jax.grad(read))(params["embedding"]))[:9]).max(-1)
    assert (gradient[4:7] > 1e-6).all()
    assert (np.delete(gradient, np.s_[4:7]) == 0).all()


def stream_weights(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model, TransformParam))["layers"]


def test_states_are_what_makes_streams_differ():
    mixers = ("gated_delta_net", "mlstm_exp", "retention")
    config = dataclasses.replace(SMALL, mixers=mixers, layers=3)
    model = make_model(config)
    weights = stream_weights(model)
    states = {name: part["mixer"]["streams"] for name, part in weights.items()}
    for name, state in states.items():
        assert state["matrix"].shape == (1, 3, 4, 8, 8), name
    assert states["1_mlstm_exp"]["normalizer"].shape == (1, 3, 4, 8)
    ids = random_ids(config, 2, LENGTH)
    apart = run_streams(model, ids)
    for p in (1, 2):
        assert np.abs(apart[:, p] - apart[:, 0]).max() > 0.1
    for stack in model.stacks():
        for weight in jax.tree.leaves(
            nnx.state(stack.mixer.streams), is_leaf=lambda x: isinstance(x, nnx.Variable)
        ):
            weight[...] = jnp.zeros_like(weight[...])
    same = run_streams(model, ids)
    np.testing.assert_allclose(same, np.broadcast_to(same[:, :1], same.shape), rtol=1e-6, atol=1e-6)


def test_memories_of_recurrences_and_windows_do_not_grow():
    def size(mixer, length):
        config = dataclasses.replace(SMALL, mixers=(mixer,), window=8, max_length=length)

        def states():
            return LanguageModel(config, rngs=nnx.Rngs(0)).init_states(2)

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(states)))

    for mixer in (*RECURRENT, "window"):
        assert size(mixer, 16) == size(mixer, 4096) > 0, mixer
    assert size("attention", 4096) == 0


@pytest.mark.parametrize("old_streams", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_growing_keeps_old_states_and_draws_new_ones(old_streams):
    old = dataclasses.replace(
        SMALL, mixers=("retention",), layers=1, streams=old_streams, transform_std=0.5
    )
    new = dataclasses.replace(old, streams=4)
    check_growable(old, new)
    given = nnx.to_pure_dict(nnx.state(make_model(old)))
    grown = begin_from(new, jax.random.key(1), given)
    for (path, array), (_, kept) in zip(
        *(
            jax.tree_util.tree_flatten_with_path(tree["layers"])[0]
            for tree in (given, grown if old_streams > 1 else given)
        ),
        strict=True,
    ):
        assert kept[tuple(map(slice, array.shape))].tobytes() == array.tobytes(), path
    state = np.asarray(grown["layers"]["mixer"]["streams"]["matrix"])
    assert state.shape == (1, 4, 4, 8, 8)
    drawn = state[:, old_streams if old_streams > 1 else 0 :]
    assert 0.4 < drawn.std() < 0.6
    with pytest.raises(InputError, match="mixers"):
        check_growable(old, dataclasses.replace(new, mixers=("gla",)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixers": ("gla", "attention"), "layers": 3}, ["layers=3", "2 names", "gla,attention"]),
        ({"mixers": ()}, ["mixers=", "layers=4"]),
        ({"mixers": ("glaa",)}, ["mixers=glaa", 'did you mean "gla"?', "retention"]),
        ({"mixers": ("gla",), "transform_init": "tokens"}, ["transform_init=tokens", "gla"]),
        ({"mixers": ("retention",), "key_dim": 3}, ["key_dim=3", "even"]),
        ({"mixers": ("window",), "window": 0}, ["window=0"]),
        ({"conv_size": 0}, ["conv_size=0"]),
        ({"key_dim": -1}, ["key_dim=-1"]),
        (
            {"mixers": ("window",), "streams": 2, "transform": "soft_tokens"},
            ["transform=soft_tokens", "window"],
        ),
    ],
)
def test_bad_value_is_named(values, words):
    with pytest.raises(InputError) as error:
        ModelConfig(**values)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_only_attention_goes_to_hugging_face(tmp_path):
    for mixer in MIXERS:
        config = dataclasses.replace(SMALL, mixers=(mixer,))
        if mixer == "attention":
            huggingface.check_exportable(config)
            continue
        with pytest.raises(InputError, match=f"mixers={mixer}"):
            huggingface.check_exportable(config)


@pytest.mark.parametrize(
    ("mixers", "length", "backward"),
    [
        (("gated_delta_net",), LENGTH, False),
        pytest.param(("gated_delta_net", "mlstm_exp"), LENGTH, True, marks=pytest.mark.slow),
        pytest.param(("aaren", "window"), LENGTH, True, marks=pytest.mark.slow),
        pytest.param(("retention", "kda", "gla"), 70, True, marks=pytest.mark.slow),
        pytest.param(("delta_net", "mlstm_sigmoid"), 70, True, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_computes_what_one_device_does(mixers, length, backward):
    """Rows, streams and heads over eight devices."""
    config = dataclasses.replace(
        SMALL, mixers=mixers, layers=len(mixers), streams=2, vocab_size=32, layer_loop="scan"
    )
    model = make_model(config)
    graph, weights = nnx.split(model)
    params = nnx.to_pure_dict(weights)
    ids = random_ids(config, 4, length)
    segments = np.repeat(np.where(np.arange(length) < 4, 1, 2)[None], 4, 0).astype(np.int32)

    def loss(params):
        logits = nnx.merge(graph, params)(ids, segment_ids=segments)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

    compute = jax.value_and_grad(loss) if backward else loss
    expected = jax.jit(compute)(params)
    mesh = make_mesh(MeshConfig(data=2, stream=2, tensor=2))
    place = lambda array, weight: jax.device_put(array, weight.sharding)
    placed = jax.tree.map(place, params, abstract_weights(weights, mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(compute)(placed)
    # Float32 sums in other orders. Gradients through exponential gates differ by up to 4e-5.
    bound = 5e-5 if "mlstm_exp" in mixers else 3e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(np.abs(b).max(), 1e-2))
