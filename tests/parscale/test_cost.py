"""The cost of decoding, against published figures, live arrays and XLA's own count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_flops import paper_model

from models.block_cache import View
from models.config import RECURRENT, ModelConfig
from models.transformer import LanguageModel
from models.weights import StreamParam, TransformParam
from parscale import cost, cost_comparison
from parscale.chips import GiB
from parscale.cost import CHIPS, decode_cost, published_cost
from parscale.cost_comparison import Totals
from parscale.flops import forward_flops, mixer_sizes
from sharding.settings import InputError

SHAPES = {"1.6B": (1536, 8320), "2.8B": (2048, 11008), "4.4B": (2560, 13824)}
BATCHES = (1, 2, 4, 8)
LENGTHS = (64, 128, 256, 512)
# GB of 2**30 bytes and seconds at batch 1, 2, 4, 8, means over prompt = output = 64 ... 512, on an
# A100 at 0.7 of its peak operations and 0.9 of its bandwidth: what the paper's script prints.
PUBLISHED = {
    ("1.6B", 1): ((3.442, 0.483), (3.522, 0.492), (3.683, 0.512), (4.004, 0.553)),
    ("1.6B", 2): ((3.479, 0.494), (3.588, 0.515), (3.805, 0.558), (4.240, 0.644)),
    ("1.6B", 4): ((3.515, 0.514), (3.651, 0.556), (3.923, 0.640), (4.466, 0.807)),
    ("1.6B", 8): ((3.587, 0.555), (3.777, 0.638), (4.158, 0.803), (4.919, 1.134)),
    ("2.8B", 1): ((5.832, 0.823), (5.917, 0.837), (6.085, 0.867), (6.423, 0.927)),
    ("4.4B", 1): ((8.921, 1.262), (9.010, 1.282), (9.187, 1.323), (9.541, 1.405)),
    ("4.4B", 2): ((8.984, 1.286), (9.111, 1.331), (9.364, 1.420), (9.872, 1.600)),
    ("4.4B", 4): ((9.054, 1.329), (9.226, 1.417), (9.570, 1.593), (10.259, 1.946)),
    ("4.4B", 8): ((9.193, 1.415), (9.456, 1.590), (9.982, 1.939), (11.033, 2.637)),
}
RATIOS = ((22.5, 6.43), (12.8, 3.25), (6.9, 1.67), (3.6, 0.88))
# Of the losses on Stack, 1.6B with P = 8 has 1.0383, 2.8B 1.0451 and 4.4B 1.0213.
SHARE = (1.0451 - 1.0383) / (1.0451 - 1.0213)
SMALL = ModelConfig(
    vocab_size=96, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, transform_size=5
)


def published_model(name: str, streams: int) -> ModelConfig:
    return paper_model(*SHAPES[name], streams)


def totals(model: ModelConfig, batch: int, lengths=tuple((n, n) for n in LENGTHS)) -> Totals:
    """Means over pairs of prompt and output."""
    return cost_comparison.mean_totals(
        [published_cost(model, CHIPS["A100"], batch, *pair) for pair in lengths]
    )


def published_ratios(batch: int, **lengths) -> Totals:
    larger = ((1 - SHARE, published_model("2.8B", 1)), (SHARE, published_model("4.4B", 1)))
    cost_of = functools.partial(totals, batch=batch, **lengths)
    return cost_comparison.increase_ratios(published_model("1.6B", 8), larger, cost_of)


@pytest.mark.parametrize(("name", "streams"), PUBLISHED)
def test_the_published_table(name, streams):
    for batch, (memory, latency) in zip(BATCHES, PUBLISHED[name, streams], strict=True):
        found = totals(published_model(name, streams), batch)
        # The table has three decimals.
        assert found.memory / GiB == pytest.approx(memory, abs=6e-4)
        assert found.latency == pytest.approx(latency, abs=6e-4)


def test_the_published_ratios_and_where_they_turn():
    for batch, (memory, latency) in zip(BATCHES, RATIOS, strict=True):
        ratios = published_ratios(batch)
        assert ratios.memory == pytest.approx(memory, rel=0.01)
        assert ratios.latency == pytest.approx(latency, rel=0.01)
    # Batch 1, 128 tokens of output, by the same formulas run on longer prompts than the paper's.
    for prompt, latency in ((64, 12.6), (512, 3.15), (2048, 0.92), (8192, 0.27), (32768, 0.11)):
        ratios = published_ratios(1, lengths=((prompt, 128),))
        assert ratios.latency == pytest.approx(latency, rel=0.02)
    assert ratios.memory == pytest.approx(0.61, rel=0.01)


def test_the_example_of_the_published_readme():
    found = published_cost(published_model("4.4B", 2), CHIPS["A100"], 2, 64, 64)
    assert found.memory.total / GiB == pytest.approx(8.951, abs=6e-4)
    assert found.latency == pytest.approx(0.354, abs=6e-4)


STREAMS = [
    (1, {}),
    (4, {}),
    (4, {"aggregation": "constant", "tied_embeddings": False}),
    (4, {"aggregation": "mean", "transform": "bias", "qkv_bias": False}),
    (2, {"transform": "low_rank"}),
    (2, {"transform": "soft_tokens"}),
    (2, {"mixers": ("kda", "mlstm_exp", "window"), "window": 7, "key_dim": 6}),
    (2, {"mixers": ("aaren", "gla", "delta_net"), "transform": "bias"}),
    (2, {"mixers": ("retention", "mlstm_sigmoid", "aaren"), "transform": "low_rank"}),
]


def with_streams(streams: int, changes: dict) -> ModelConfig:
    return dataclasses.replace(SMALL, streams=streams, **changes)


@pytest.mark.parametrize(("streams", "changes"), STREAMS)
def test_bytes_are_those_of_live_arrays(streams, changes):
    config = with_streams(streams, changes)

    def build():
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        parts = nnx.state(model, TransformParam, StreamParam, ...)
        # Each stream of a row in one block, and nobody's block left out.
        blocks = model.init_blocks(3 * streams, model.soft_length + 7 + 9)
        return [nnx.to_pure_dict(part) for part in parts], (blocks, model.init_states(3))

    # Of the variants, the shapes alone: to compute them would take seconds each.
    parts, cache = jax.eval_shape(build) if changes else build()
    size = lambda arrays: sum(
        array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays)
    )
    memory = decode_cost(config, CHIPS["v5e"], 3, 7, 9, weight_bytes=4, activation_bytes=4).memory
    assert (memory.transform, memory.aggregation, memory.weights) == tuple(map(size, parts))
    assert memory.kv_cache == size(cache)


@pytest.mark.parametrize(("streams", "changes"), STREAMS)
def test_a_step_reads_every_weight_once_that_it_uses(streams, changes):
    config = with_streams(streams, changes)
    # An activation of hardly any size leaves weights, the logits and the rows looked up.
    work = cost.forward_work(config, 2, 1, 10, weight_bytes=4, activation_bytes=1e-9)
    read = sum(part.bytes for part in work.values())
    state = sum(cost.cache_elements(config, mixer, 0)[1] for mixer in config.mixers)
    repeats = config.layers // len(config.mixers)
    read -= 2 * 4 * 2 * streams * repeats * state
    read -= 2 * 4 * config.width + 2 * 4 * config.vocab_size
    counts = cost.parameter_counts(config)
    unused = 0 if config.tied_embeddings else config.vocab_size * config.width
    # By now they are in the cache: soft tokens and initial states.
    if config.transform == "soft_tokens":
        unused = streams * config.transform_size * config.width
    if config.transform == "prefix" and streams > 1:
        unused += sum(size.streams for size in mixer_sizes(config) if size.mixer in RECURRENT)
    assert read == pytest.approx(4 * (counts["total"] - unused), rel=1e-7)


@pytest.mark.parametrize(("streams", "transform"), [(1, "prefix"), (4, "prefix"), (4, "low_rank")])
def test_operations_of_a_step_are_those_that_xla_counts(streams, transform):
    config = ModelConfig(
        vocab_size=1024, width=512, layers=2, heads=8, kv_heads=2, mlp_width=1408, streams=streams,
        transform=transform, transform_size=16, layer_loop="unroll",
    )  # fmt: skip
    rows, slots = 2, 64

    def build():
        model = LanguageModel(config, rngs=nnx.Rngs(0)).unstack()
        return model, model.init_blocks(1 + rows * streams, slots)

    model, cache = nnx.eval_shape(build)
    graph, weights = nnx.split(model)
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    lists = jax.ShapeDtypeStruct((rows, streams, 1), jnp.int32)
    view = View(lists, lists, lists)

    def step(weights, ids, positions, cache, view):
        return nnx.merge(graph, weights)(ids, positions=positions, cache=cache, view=view)

    lowered = jax.jit(step).lower(nnx.to_pure_dict(weights), ids, ids, cache, view)
    counted = lowered.compile().cost_analysis()["flops"]
    # XLA's dense form attends to all slots of the cache.
    work = cost.forward_work(config, rows, 1, slots - 1)
    formula = sum(part.flops for part in work.values())
    # XLA also counts elementwise work, as in the test of training's operations.
    assert formula < counted < 1.02 * formula


@pytest.mark.parametrize("mixers", [("attention",), ("window", "kda", "aaren")])
def test_a_prefill_computes_as_much_as_its_tokens_one_by_one(mixers):
    config = dataclasses.replace(SMALL, streams=4, mixers=mixers, window=4)
    whole = cost.forward_work(config, 3, 11, 0)
    steps = cost.forward_work(config, 3, 1, np.arange(11))
    for name in ("projections", "attention", "mlp"):
        single = np.broadcast_to(steps[name].flops, 11).sum()
        assert whole[name].flops == pytest.approx(single, rel=1e-12)


def test_recurrences_compute_the_same_in_decoding_as_in_training():
    config = dataclasses.replace(SMALL, mixers=("gla", "gated_delta_net", "mlstm_exp"))
    work = cost.forward_work(config, 3, 11, 5)
    del work["head"]
    head = 2 * 11 * config.width * config.vocab_size
    assert sum(part.flops for part in work.values()) == 3 * (forward_flops(config, 11) - head)


def test_a_recurrent_state_is_all_the_memory_that_grows_with_streams():
    config = dataclasses.replace(SMALL, mixers=("gated_delta_net",), streams=2)
    short, long = (decode_cost(config, CHIPS["v5e"], 2, 8, n) for n in (8, 4096))
    assert short.memory.kv_cache == long.memory.kv_cache
    assert short.step == pytest.approx(long.step, rel=1e-9)


def test_a_part_takes_the_longer_of_computing_and_moving():
    config = dataclasses.replace(SMALL, streams=4)
    chip = cost.Chip("slow", flops=1e9, memory=1000, bandwidth=1e6)
    rates = {"flops_efficiency": 0.5, "bandwidth_efficiency": 0.25}
    found = decode_cost(config, chip, 2, 6, 4, **rates)
    assert not found.fits(chip)
    assert found.steps == 3
    expected = np.zeros(3)
    for step in range(3):
        for part in cost.forward_work(config, 2, 1, 6 + step).values():
            expected[step] += max(part.flops / 0.5e9, part.bytes / 0.25e6)
    assert found.decode.total == pytest.approx(expected.sum(), rel=1e-12)
    assert found.step == pytest.approx(expected.mean(), rel=1e-12)
    assert found.latency == found.prefill.total + found.decode.total
    parts = dataclasses.astuple(found.memory)
    assert found.memory.total == sum(parts)
    single = decode_cost(config, chip, 2, 6, 1)
    assert (single.decode.total, single.step) == (0, 0)


def test_what_a_stream_adds_at_batch_one_is_small_and_grows_with_the_batch():
    def shares(batch):
        one, eight = (
            decode_cost(published_model("1.6B", streams), CHIPS["H100"], batch, 64, 64)
            for streams in (1, 8)
        )
        return eight.step / one.step - 1, eight.memory.total / one.memory.total - 1

    latencies, memories = zip(*map(shares, (1, 8, 64)), strict=True)
    # At batch 1 a step reads the weights: eight streams add their own and a short cache.
    assert 0 < latencies[0] < 0.05
    assert 0 < memories[0] < 0.05
    assert latencies[0] < latencies[1] < latencies[2]
    assert memories[0] < memories[1] < memories[2]


def test_parameters_of_equal_loss():
    model = published_model("1.6B", 8)
    (first, low), (second, high) = cost_comparison.equal_loss(model, 0.3935)
    assert first + second == pytest.approx(1)
    assert high.head_dim == low.head_dim + 2
    sizes = [cost.parameter_counts(shape)["non_embedding"] for shape in (low, high)]
    # The paper's law on Stack multiplies parameters by 1.818 at P = 8: 2.90B.
    assert first * sizes[0] + second * sizes[1] == pytest.approx(2.90e9, rel=1e-3)
    assert low.mlp_width / low.width == pytest.approx(model.mlp_width / model.width, rel=1e-3)
    # Of a plain model, that is the model itself.
    plain = dataclasses.replace(model, streams=1)
    assert cost_comparison.equal_loss(plain)[0] == (1, plain)


def test_bad_input():
    calls = {
        'chip=h10: expected one of A100, .*did you mean "H100"': lambda: cost.find_chip("h10"),
        "batch=0: expected at least 1": lambda: decode_cost(SMALL, CHIPS["v4"], 0, 1, 1),
        "prompt=0": lambda: decode_cost(SMALL, CHIPS["v4"], 1, 0, 1),
        "output=-1": lambda: published_cost(SMALL, CHIPS["v4"], 1, 1, -1),
        "flops_efficiency=1.5": lambda: decode_cost(
            SMALL, CHIPS["v4"], 1, 1, 1, flops_efficiency=1.5
        ),
        "mixers=gla: the paper": lambda: published_cost(
            dataclasses.replace(SMALL, mixers=("gla",)), CHIPS["v4"], 1, 1, 1
        ),
        "k=-0.1": lambda: cost_comparison.equal_loss(SMALL, -0.1),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
    assert cost.find_chip("a100") is CHIPS["A100"]
