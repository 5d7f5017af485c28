import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest

from parscale import data, prepared, tokenizers
from parscale.config import DataConfig
from parscale.packing import MemoryTokens, Rows, offsets_of
from sharding.settings import InputError


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = random.Random(0)
    for i in range(60):
        text = " ".join(
            words.choice(("ab", "c", "déf", "gh\n")) for _ in range(words.randrange(1, 60))
        )
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def config(texts):
    return DataConfig(corpus=str(texts), length=16, batch=8, held_out=0.2, seed=3)


def rows_of(iterator, batches):
    return [batch["row"].tolist() for batch in itertools.islice(iterator, batches)]


def synthetic(rows, length=4):
    tokens = MemoryTokens(
        np.arange(rows * length + 1) % 251, offsets_of(np.array([rows * length + 1]))
    )
    train = Rows(tokens, length, keep_partial=False)
    return data.Data(train, train, tokenizers.load("bytes"), "", 1, 1, 1, 1, 1, 1)


def test_both_sides_together_are_the_corpus(config, texts):
    opened = data.open_data(config, 256)
    whole = data.open_files(config.corpus, config, 256)
    for what in ("documents", "tokens", "bytes"):
        parts = getattr(opened, f"train_{what}") + getattr(opened, f"held_out_{what}")
        assert parts == getattr(whole, f"held_out_{what}")
        assert getattr(whole, f"train_{what}") == 0
    assert opened.train_bytes + opened.held_out_bytes == sum(
        path.stat().st_size for path in texts.iterdir()
    )
    assert opened.corpus_hash == whole.corpus_hash
    assert len(whole.train) == 0

    def documents(tokens):
        cuts = tokens.offsets[1:-1]
        return {piece.tobytes() for piece in np.split(tokens.tokens, cuts)}

    train, held_out = documents(opened.train.tokens), documents(opened.held_out.tokens)
    assert not train & held_out
    assert train | held_out == {path.read_bytes() for path in texts.iterdir()}


def test_bits_per_byte(config):
    opened = data.open_data(config, 256)
    assert opened.bytes_per_token == 1
    assert opened.bits_per_byte(math.log(2)) == 1
    coarse = dataclasses.replace(opened, held_out_bytes=4 * opened.held_out_tokens)
    assert coarse.bits_per_byte(math.log(2)) == 0.25


def test_bpe_data(config, texts, tmp_path):
    pytest.importorskip("tokenizers")
    bpe = tokenizers.train_bpe([path.read_text("utf-8") for path in texts.iterdir()], 300)
    bpe.save(tmp_path / "tokenizer.json")
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"), length=4)
    opened = data.open_data(config, 512)
    assert opened.tokenizer == bpe
    assert (
        opened.held_out_bytes
        == data.open_data(dataclasses.replace(config, tokenizer="bytes"), 256).held_out_bytes
    )
    assert opened.bytes_per_token > 1.5
    with pytest.raises(InputError, match=f"model.vocab_size=256, but .* {bpe.vocab_size} tokens"):
        data.open_data(config, 256)


def test_the_order_is_the_same_for_any_number_of_hosts():
    # 50 rows and batches of 8: 20 batches go over three borders of epochs.
    opened, config = synthetic(50), DataConfig(batch=8)
    whole = rows_of(data.train_batches(opened, config), 20)
    for hosts in (2, 4):
        parts = [rows_of(data.train_batches(opened, config, i, hosts), 20) for i in range(hosts)]
        assert [[*itertools.chain(*step)] for step in zip(*parts, strict=True)] == whole
    order = [*itertools.chain(*whole)]
    epochs = [order[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(50))


def test_the_seed_gives_the_order():
    opened = synthetic(50)
    orders = [
        rows_of(data.train_batches(opened, DataConfig(batch=8, seed=seed)), 20)
        for seed in (0, 0, 1, 2**32 - 1)
    ]
    assert orders[0] == orders[1]
    # Neighbouring seeds must not give each other's epochs a step later.
    epochs = {
        tuple([*itertools.chain(*order)][i : i + 50]) for order in orders for i in (0, 50, 100)
    }
    assert len(epochs) == 9
    with pytest.raises(InputError, match=r"data\.seed=-1"):
        data.train_batches(opened, DataConfig(seed=-1))


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 13])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2), (2, 1)])
def test_a_resumed_run_reads_what_was_left(stop, before, after):
    opened, config = synthetic(50), DataConfig(batch=8)
    whole = rows_of(data.train_batches(opened, config), 24)
    first = [data.train_batches(opened, config, i, before) for i in range(before)]
    for iterator in first:
        rows_of(iterator, stop)
    states = {json.dumps(iterator.get_state()) for iterator in first}
    assert len(states) == 1
    second = [data.train_batches(opened, config, i, after) for i in range(after)]
    for iterator in second:
        next(iterator)  # so that threads have already read ahead from another place
        iterator.set_state(json.loads(min(states)))
    parts = [rows_of(iterator, 24 - stop) for iterator in second]
    assert [[*itertools.chain(*step)] for step in zip(*parts, strict=True)] == whole[stop:]


def test_batches_hold_the_rows_they_name(config):
    opened = data.open_data(config, 256)
    for batch in itertools.islice(data.train_batches(opened, config), 5):
        for name, values in opened.train.take(batch["row"]).items():
            np.testing.assert_array_equal(batch[name], values)


def test_held_out_batches_cover_every_target_once(config):
    opened = data.open_data(config, 256)
    batches = list(data.held_out_batches(opened, 8))
    rows = np.concatenate([batch["row"] for batch in batches])
    assert rows[: len(opened.held_out)].tolist() == list(range(len(opened.held_out)))
    assert (rows[len(opened.held_out) :] == -1).all()
    assert all(batch["ids"].shape == (8, 16) for batch in batches)
    # The first token of a document has nothing before it in its document.
    scored = sum(batch["mask"].sum() for batch in batches)
    assert scored == opened.held_out_tokens - opened.held_out_documents

    parts = [list(data.held_out_batches(opened, 8, 0, i, 4)) for i in range(4)]
    joined = [np.concatenate([b["row"] for b in step]) for step in zip(*parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(joined), rows)


def test_fewer_held_out_rows_are_evenly_spaced():
    opened = synthetic(50)
    (batch,) = data.held_out_batches(opened, 8, most_rows=5)
    assert batch["row"].tolist() == [0, 10, 20, 30, 40, -1, -1, -1]
    assert len(list(data.held_out_batches(opened, 8, most_rows=1000))) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 1000}, r"make \d+ rows of 16, fewer than one batch of 1000"),
        ({"corpus": "nowhere"}, "corpus nowhere: no file is there"),
        ({"tokenizer": "nothing.json"}, "tokenizer nothing.json: no such file"),
        ({"held_out": 1e-6}, "none to hold out; --config.data.held_out=0.0"),
    ],
)
def test_bad_data_is_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        data.open_data(dataclasses.replace(config, **change), 256)


def test_other_refusals(config, tmp_path):
    with pytest.raises(InputError, match=r"model.vocab_size=100, but .* 256 tokens"):
        data.open_data(config, 100)
    with pytest.raises(InputError, match="batch=8 does not divide over 3 hosts"):
        data.train_batches(synthetic(50), DataConfig(batch=8), 0, 3)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="1 tokens are too few"):
        data.open_files(str(tmp_path), config, 256)


def test_a_prepared_folder_gives_the_same_batches(config, tmp_path):
    folder = tmp_path / "prepared"
    prepared.prepare(config.corpus, tokenizers.load("bytes"), folder, held_out=0.2, record_tokens=7)
    memory = data.open_data(config, 256)
    stored = data.open_data(dataclasses.replace(config, corpus=str(folder)), 256)
    for field in dataclasses.fields(data.Data):
        if field.name not in ("train", "held_out"):
            assert getattr(stored, field.name) == getattr(memory, field.name)
    pairs = [
        *zip(data.held_out_batches(memory, 8), data.held_out_batches(stored, 8), strict=True),
        *zip(
            itertools.islice(data.train_batches(memory, config), 30),
            itertools.islice(data.train_batches(stored, config), 30),
            strict=True,
        ),
    ]
    for expected, found in pairs:
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_a_prepared_folder_must_fit_the_configuration(config, texts, tmp_path):
    folder = tmp_path / "prepared"
    prepared.prepare(config.corpus, tokenizers.load("bytes"), folder, held_out=0.2)
    config = dataclasses.replace(config, corpus=str(folder))
    with pytest.raises(
        InputError, match=r"held_out=0.2, but .*=0.1; give --config.data.held_out=0.2"
    ):
        data.open_data(dataclasses.replace(config, held_out=0.1), 256)
    pytest.importorskip("tokenizers")
    bpe = tokenizers.train_bpe([path.read_text("utf-8") for path in texts.iterdir()], 300)
    bpe.save(tmp_path / "tokenizer.json")
    other = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer bytes, but .*--config.data.tokenizer=bytes"):
        data.open_data(other, 512)
