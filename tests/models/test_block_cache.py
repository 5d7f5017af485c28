"""Whole texts over blocks of a cache: what a pass under a mask says, and what it costs."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forked_decoding import SLOTS, Decoder, random_text, whole
from random_models import SMALL, forward, make_model, random_ids

import models.attention
from models import block_cache
from models.block_cache import View, with_states
from models.segments import Rules, Segment, lay_out
from models.weights import abstract_weights
from pallas_kernels import attention
from sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("little_optimization")

MESH = {"data": 2, "stream": 2, "tensor": 2}
SLOW = pytest.mark.slow


def assert_decodes_as_a_whole(model, layout, seed, tolerance, marks=None) -> Decoder:
    decoder = Decoder(model, np.random.default_rng(seed))
    found, expected = decoder.decode(layout, marks), whole(model, layout, marks)
    if model.config.dtype == "float32":
        # The outputs that count; the aggregation, being float32, says no more in float64.
        found, expected = (logits(model, x) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    return decoder


def logits(model, x):
    return np.asarray(model.logits(model.mix(jnp.moveaxis(jnp.asarray(x), 1, 0)[None]))[0])


def random_marks(layout, rng):
    """A number for each segment."""
    return rng.integers(0, 4, len(layout.description))[layout.segments].astype(np.int32)


@pytest.mark.parametrize(
    ("streams", "transform", "branches", "layer_loop"),
    [
        (1, "prefix", 3, "unroll"),
        (2, "prefix", 0, "scan"),
        pytest.param(2, "prefix", 3, "unroll", marks=SLOW),
        pytest.param(2, "soft_tokens", 0, "scan", marks=SLOW),
        pytest.param(2, "low_rank", 0, "unroll", marks=SLOW),
        pytest.param(2, "bias", 0, "scan", marks=SLOW),
    ],
)
def test_forks_and_joins_decode_what_the_branch_mask_says(streams, transform, branches, layer_loop):
    config = dataclasses.replace(
        SMALL, streams=streams, transform=transform, branches=branches, layer_loop=layer_loop
    )
    model = make_model(config)
    rng = np.random.default_rng(streams)
    ways = [Rules(), Rules("depth", "concatenated"), Rules("flat"), Rules(sees="text")]
    ways = ways[:: 1 if streams == 1 else 2]
    for seed, way in enumerate(ways):
        text = random_text(rng, config.vocab_size, depth=3 if way.sees == "cache" else 1)
        layout = lay_out(text, way)
        marks = random_marks(layout, rng) if branches else None
        assert_decodes_as_a_whole(model, layout, seed, 1e-5, marks)


def test_forks_and_joins_in_float64(monkeypatch):
    # Only the oracle computes attention in float64.
    oracle = functools.partial(attention, implementation="oracle")
    monkeypatch.setattr(models.attention, "attention", oracle)
    monkeypatch.setattr(block_cache, "attention", oracle)
    config = dataclasses.replace(SMALL, streams=2, layers=1)
    object.__setattr__(config, "dtype", "float64")
    with jax.enable_x64(True):
        graph, params = nnx.split(make_model(config))
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype("float64"), params))
        for seed in range(2):
            layout = lay_out(random_text(np.random.default_rng(seed), config.vocab_size))
            assert_decodes_as_a_whole(model, layout, seed, 1e-10)


def test_one_branch_is_plain_decoding():
    config = dataclasses.replace(SMALL, streams=1, branches=3)
    model = make_model(config)
    ids = random_ids(config, 1, 11)
    layout = lay_out([Segment(tuple(map(int, ids[0])))])
    decoder = Decoder(model, np.random.default_rng(0))
    found = logits(model, decoder.decode(layout, np.zeros_like(layout.ids)))
    expected = forward(model, ids)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_forks_of_a_prompt_hold_one_copy_of_it():
    model = make_model(dataclasses.replace(SMALL, streams=1, branches=3))
    prompt, paths = Segment(tuple(range(SLOTS * 5))), 12
    text = [prompt, *(Segment((7,), (0,)) for _ in range(paths))]
    text.append(Segment((1,), tuple(range(1, paths + 1))))
    layout = lay_out(text)
    decoder = assert_decodes_as_a_whole(model, layout, 0, 1e-5, np.zeros_like(layout.ids))
    assert decoder.used == 5 + paths + 1


def in_passes(model, ids, lengths, *, positions=0, kept=0):
    """Outputs `[B, P, T, D]` of rows whose tokens go in by passes of these lengths.

    The first token stands at `positions`, and its key is kept as if it stood at `kept`.
    """
    (rows, length), streams = ids.shape, model.config.streams
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, ids, a: nnx.merge(graph, params).run_streams(ids, **a))
    ranges, size = rows * streams, -(-length // SLOTS)
    cache = with_states(model.init_blocks(ranges * (size + 1), SLOTS), model.init_states(rows))
    # One range for each stream of each row, as meshes want it; its first block is nobody's.
    blocks = np.arange(ranges * (size + 1)).reshape(rows, streams, -1)[..., 1:]
    shift = np.full(blocks.shape, positions - kept) if positions != kept else None
    outs, start = [], 0
    for count in lengths:
        token = start + np.arange(count)
        at = np.broadcast_to(token, (rows, count))
        counts = np.broadcast_to(np.clip(start - SLOTS * np.arange(size), 0, SLOTS), blocks.shape)
        places = blocks[..., token // SLOTS] * SLOTS + token % SLOTS
        view = View(blocks, counts, places, None if shift is None else at + kept, shift)
        view = jax.tree.map(lambda x: x.astype(np.int32), view)
        arguments = {"positions": at + positions, "cache": cache, "view": view}
        out, cache = run(params, ids[:, start : start + count], arguments)
        outs.append(np.asarray(out))
        start += count
    return np.concatenate(outs, 2)


@pytest.mark.parametrize(
    ("mixers", "positions", "kept", "mesh"),
    [
        (("attention",), 20, 0, {}),
        pytest.param(("attention",), 20, 20, {}, marks=SLOW),
        pytest.param(("attention",), 20, 0, MESH, marks=SLOW),
        # A window mixer has its row's positions from 0 on.
        pytest.param(("attention", "gla", "window"), 0, 0, {}, marks=SLOW),
    ],
)
def test_passes_over_a_growing_view_are_one_pass(mixers, positions, kept, mesh):
    config = dataclasses.replace(
        SMALL, streams=2, mixers=mixers, layers=max(len(mixers), 2), window=4, vocab_size=32
    )
    model, ids = make_model(config), random_ids(config, 2, 11)
    graph, params = nnx.split(model)
    at = np.broadcast_to(positions + np.arange(11), (2, 11))
    run = jax.jit(lambda params: nnx.merge(graph, params).run_streams(ids, positions=at)[0])
    expected = np.asarray(run(params))
    if mesh:
        mesh = make_mesh(MeshConfig(**mesh))
        place = lambda array, weight: jax.device_put(array, weight.sharding)
        params = nnx.to_pure_dict(params)
        params = jax.tree.map(place, params, abstract_weights(nnx.state(model), mesh))
        model = nnx.merge(graph, params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        found = in_passes(model, ids, (5, 3, 1, 2), positions=positions, kept=kept)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_a_step_copies_no_blocks(layer_loop):
    """The temporary memory of decoding has no part that grows with the cache."""
    model = make_model(dataclasses.replace(SMALL, streams=2, layer_loop=layer_loop))
    graph, params = nnx.split(model)
    lists = np.ones((3, 2, 4), np.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, cache, ids):
        def step(carry, _):
            ids, cache = carry
            view = View(lists, lists, lists[..., :1])
            logits, cache = nnx.merge(graph, params)(ids, cache=cache, view=view)
            return (jnp.argmax(logits, -1).astype(jnp.int32), cache), ids

        return jax.lax.scan(step, (ids, cache), length=2)

    def memory(blocks):
        cache = with_states(model.init_blocks(blocks, SLOTS), model.init_states(3))
        stats = decode.lower(params, cache, np.zeros((3, 1), np.int32)).compile().memory_analysis()
        held = sum(x.nbytes for x in jax.tree.leaves(cache))
        assert stats.alias_size_in_bytes >= held
        return stats.temp_size_in_bytes

    assert memory(64) == memory(4096)


def test_isolated_branches_have_no_influence_on_each_other():
    # Every token once, so that its row of the embedding is its own.
    sizes = {0: (4, ()), 1: (5, (0,)), 2: (3, (0,)), 3: (4, (1,)), 4: (3, (1,)), 5: (2, (3, 4))}
    tokens = iter(range(31))
    text = [Segment(tuple(next(tokens) for _ in range(n)), after) for n, after in sizes.values()]
    layout = lay_out(text)
    graph, params = nnx.split(make_model(dataclasses.replace(SMALL, streams=2)))
    params = nnx.to_pure_dict(params)

    def outputs(embedding, place):
        model = nnx.merge(graph, params | {"embedding": embedding})
        arguments = {"positions": layout.positions[None], "mask": layout.mask}
        return jnp.sum(jnp.sin(model(layout.ids[None], **arguments)[0, place]))

    gradient = jax.jit(jax.grad(outputs))
    reached = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {0, 1, 3}, 4: {0, 1, 4}, 5: {0, 1, 3, 4, 5}}
    for number, seen in reached.items():
        last = int(np.flatnonzero(layout.segments == number)[-1])
        found = np.asarray(gradient(params["embedding"], last))
        for other in range(6):
            rows = found[layout.ids[layout.segments == other]]
            assert (rows != 0).all() if other in seen else (rows == 0).all()
