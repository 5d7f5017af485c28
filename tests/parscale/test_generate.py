"""Generation: which tokens are candidates, how often they are drawn, and what a row depends on."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from engine_models import make_writer
from flax import nnx

from models.config import ModelConfig
from parscale import generate
from parscale.generate import TextRow
from parscale.sampling import GREEDY, Sampling, as_arrays, choose, keep_candidates
from parscale.tokenizers import ByteTokenizer
from sharding.settings import InputError

CONFIG = ModelConfig(
    vocab_size=260, width=32, layers=1, heads=4, kv_heads=2, mlp_width=48, streams=2,
    transform_size=4, max_length=128,
)  # fmt: skip
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16]]
TOKENS = 12
WARM = Sampling(temperature=1.0, seed=3)


@functools.cache
def warm_tokens() -> np.ndarray:
    return generate.generate(make_writer(CONFIG), PROMPTS, TOKENS, WARM)


@jax.jit
def next_logits(ids):
    graph, params = nnx.split(make_writer(CONFIG))
    return nnx.merge(graph, params)(ids)


def test_greedy_tokens_are_those_of_the_forward_pass():
    found = generate.generate(make_writer(CONFIG), PROMPTS, TOKENS)
    assert found.shape == (3, TOKENS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        whole = np.zeros((1, 6 + TOKENS), np.int32)
        whole[0, : len(prompt) + TOKENS] = [*prompt, *row]
        best = np.argmax(next_logits(whole)[0], -1)
        np.testing.assert_array_equal(row, best[len(prompt) - 1 : len(prompt) + TOKENS - 1])


def test_a_row_depends_on_itself_alone():
    alone = generate.generate(make_writer(CONFIG), PROMPTS[:1], TOKENS, WARM)
    np.testing.assert_array_equal(alone[0], warm_tokens()[0])
    other = [PROMPTS[0], [20] * 9, PROMPTS[2]]
    beside = generate.generate(make_writer(CONFIG), other, TOKENS, WARM)
    np.testing.assert_array_equal(beside[[0, 2]], warm_tokens()[[0, 2]])
    # Rows with the same prompt make choices of their own.
    same = generate.generate(make_writer(CONFIG), [PROMPTS[0]] * 3, TOKENS, WARM)
    assert len({tuple(row) for row in same}) == 3
    np.testing.assert_array_equal(same[0], warm_tokens()[0])


def test_the_seed_counts():
    again = generate.generate(make_writer(CONFIG), PROMPTS, TOKENS, WARM)
    np.testing.assert_array_equal(again, warm_tokens())
    other = generate.generate(
        make_writer(CONFIG), PROMPTS, TOKENS, Sampling(temperature=1.0, seed=4)
    )
    assert (other != warm_tokens()).mean() > 0.5


def numpy_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Temperature, then the top k, then the fewest that reach p, all by sorting."""
    logits = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    chances = np.exp(logits[order] - logits[order[0]])
    chances /= chances.sum()
    found = np.zeros(len(logits))
    enough = 1 + np.searchsorted(np.cumsum(chances), sampling.top_p) if sampling.top_p < 1 else None
    found[order[:enough]] = chances[:enough]
    return found / found.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.5, seed=1),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
        Sampling(temperature=1.5, top_k=6, top_p=0.8, seed=2),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(sampling):
    logits = np.array([0.3, 2.0, -1.0, 1.7, 0.0, 1.1, -4.0, 0.9, 1.5, -0.2], np.float32)
    draws = 10000
    rows = [(dataclasses.replace(sampling, index=index), 0) for index in range(draws)]
    choice, method = as_arrays(rows, draws)
    positions = np.arange(draws, dtype=np.int32) % 50
    tokens = jax.jit(choose, static_argnums=3)(
        np.broadcast_to(logits, (draws, 10)), choice, positions, method
    )
    expected = numpy_probabilities(logits, sampling)
    found = np.bincount(tokens, minlength=10) / draws
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a count.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-45])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature):
    logits = np.array([[40.0, 50.0, 60.0, -30.0]], np.float32)
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=2, top_p=0.5)):
        choice, method = as_arrays([(sampling, 0)], 1)
        assert method == "random"
        token = jax.jit(choose, static_argnums=3)(logits, choice, np.zeros(1, np.int32), method)
        assert token.tolist() == [2]


def test_candidates_of_many_rows_against_numpy():
    logits = (3 * np.random.default_rng(0).normal(size=(64, 30))).astype(np.float32)
    for top_k, top_p in itertools.product((0, 1, 5, 29, 31), (1e-6, 0.5, 0.95, 1.0)):
        kept = np.isfinite(keep_candidates(logits, np.full(64, top_k), np.full(64, top_p)))
        sampling = Sampling(top_k=top_k, top_p=top_p)
        expected = np.stack([numpy_probabilities(row, sampling) > 0 for row in logits])
        np.testing.assert_array_equal(kept, expected)


def text_of(ids) -> str:
    return ByteTokenizer().decode([i for i in ids if i < 256])


def streamed_pieces(prompts, tokens, **options) -> list[list[str]]:
    engine = generate.engine_for(make_writer(CONFIG), prompts, tokens)
    numbers = generate.submit_all(engine, prompts, tokens, WARM)
    return list(generate.stream_text(engine, ByteTokenizer(), numbers, **options))


def test_streamed_text_is_the_completed_text():
    prompts = ["abc", "x", "some"]
    encoded = [ByteTokenizer().encode(prompt) for prompt in prompts]
    model = make_writer(CONFIG)
    pieces = streamed_pieces(encoded, TOKENS)
    assert len(pieces) > 2
    streamed = ["".join(parts) for parts in zip(*pieces, strict=True)]
    assert generate.complete(model, ByteTokenizer(), prompts, TOKENS, WARM) == streamed
    assert streamed == [text_of(row) for row in generate.generate(model, encoded, TOKENS, WARM)]
    # Stop strings that lie across a border of chunks, and inside one; one row meets none.
    stops = [streamed[0][7:10], streamed[1][2:4]]
    stopped = generate.complete(model, ByteTokenizer(), prompts, TOKENS, WARM, stops=stops)
    assert stopped == [cut(text, stops) for text in streamed]
    assert len(stopped[0]) <= 7
    assert len(stopped[1]) <= 2


def test_generation_ends_when_every_row_has_stopped():
    encoded = [ByteTokenizer().encode("abc")]
    stop = generate.complete(make_writer(CONFIG), ByteTokenizer(), ["abc"], 28, WARM)[0][3:5]
    assert len(streamed_pieces(encoded, 28, stops=[stop])) <= 3


def cut(text: str, stops: list[str]) -> str:
    """`text` before the stop string that is whole first, character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("one two three", ["three", "two", ""]),
        ("aaab", ["aab"]),
        ("abcd", ["abc", "b"]),
        ("abcd", ["bcd", "abcd", "c"]),
        ("ababac", ["abac"]),
        ("no stop here", ["stops", "heres"]),
        ("naïve ünïcode end", ["ïco"]),
        ("", ["x"]),
    ],
)
def test_stop_strings_do_not_depend_on_how_the_text_comes(text, stops):
    ids = list(text.encode())
    cuts = range(1, len(ids))
    ways = [(), cuts, *([place] for place in cuts), *itertools.combinations(cuts, 2)]
    for way in ways:
        row = TextRow(ByteTokenizer(), stops)
        borders = [0, *way, len(ids)]
        parts = [row.push(ids[a:b]) for a, b in itertools.pairwise(borders)]
        assert "".join(parts) + row.flush() == cut(text, stops)
        assert row.done == (cut(text, stops) != text)
        assert row.flush() == ""


def test_half_a_character_at_the_end_may_complete_a_stop_string():
    row = TextRow(ByteTokenizer(), ["b\ufffd"])
    assert row.push([*b"ab", 0xC3]) == "a"
    assert row.flush() == ""
    assert row.done


def test_text_is_given_out_as_soon_as_it_is_certain():
    row = TextRow(ByteTokenizer(), ["end"])
    assert [row.push([byte]) for byte in b"an en de"] == [
        "a", "n", " ", "", "", "en ", "d", "",
    ]  # fmt: skip
    assert row.flush() == "e"


@pytest.mark.parametrize(
    ("prompts", "tokens", "words"),
    [
        ([], 1, ("no prompt",)),
        ([[1], []], 1, ("prompt 1 is empty",)),
        ([[1]], 0, ("tokens=0",)),
        ([[1, 260]], 1, ("prompt 0", "id 260", "260", "tokenizer")),
        ([[-1, 3]], 1, ("prompt 0", "id -1")),
        ([[1] * 100], 29, ("100 tokens", "29", "max_length=128")),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, tokens, words):
    with pytest.raises(InputError) as error:
        generate.generate(make_writer(CONFIG), prompts, tokens)
    for word in words:
        assert word in str(error.value)


def test_ways_of_sampling_that_cannot_be_are_refused():
    for settings, word in (
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2**31}, "top_k=2147483648"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ):
        with pytest.raises(InputError, match=word):
            Sampling(**settings)
    assert Sampling(temperature=0.0) == GREEDY
