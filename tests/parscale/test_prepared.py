import dataclasses
import json

import numpy as np
import pytest

from parscale import corpora, prepared, tokenizers
from sharding.settings import InputError

BYTES = tokenizers.load("bytes")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i} " * (i * i + 1))
    return folder


def stream_of(texts, held_out_side, share=0.2):
    found = corpora.documents(corpora.find(str(texts)))
    return [d.data for d in found if (d.place < share) == held_out_side]


@pytest.mark.parametrize(("record_tokens", "shard_records"), [(50, 300), (64, 120), (4096, 3)])
def test_any_span_is_that_of_the_joined_documents(texts, tmp_path, record_tokens, shard_records):
    sizes = {"record_tokens": record_tokens, "shard_records": shard_records}
    metadata = prepared.prepare(str(texts), BYTES, tmp_path, held_out=0.2, **sizes)
    random = np.random.default_rng(0)
    for side, tokens in enumerate(prepared.read_tokens(tmp_path, metadata)):
        documents = stream_of(texts, bool(side))
        expected = np.frombuffer(b"".join(documents), np.uint8)
        assert tokens.offsets.tolist() == [0, *np.cumsum([len(d) for d in documents])]
        np.testing.assert_array_equal(tokens.span(0, len(expected)), expected)
        for _ in range(50):
            start, stop = np.sort(random.integers(0, len(expected), 2))
            np.testing.assert_array_equal(tokens.span(start, stop), expected[start:stop])


def test_a_large_side_has_several_shards_of_bounded_records(texts, tmp_path):
    metadata = prepared.prepare(
        str(texts), BYTES, tmp_path, held_out=0.2, record_tokens=1000, shard_records=50
    )
    records = -(-metadata.train.tokens // 1000)
    assert len(metadata.train.shards) == -(-records // 50) > 3
    train, _ = prepared.read_tokens(tmp_path, metadata)
    train.span(0, train.offsets[-1])
    sizes = [len(r) for i in range(len(train.paths)) for r in train._reader(i).read_all()]
    assert set(sizes[:-1]) == {1000}
    assert 0 < sizes[-1] <= 1000


def test_metadata_says_what_was_prepared(texts, tmp_path):
    metadata = prepared.prepare(str(texts), BYTES, tmp_path, held_out=0.2)
    assert prepared.read_metadata(tmp_path) == metadata
    documents = [stream_of(texts, held_out) for held_out in (False, True)]
    for side, name in enumerate(prepared.SIDES):
        found = getattr(metadata, name)
        assert found.documents == len(documents[side])
        assert found.tokens == found.bytes == sum(map(len, documents[side]))
    assert metadata.tokenizer == "bytes"
    assert metadata.dtype == "|u1"
    assert prepared.is_prepared(tmp_path)
    assert not prepared.is_prepared(texts)
    assert not (tmp_path / prepared.UNFINISHED).exists()


def test_a_bpe_tokenizer_is_kept_in_the_folder(texts, tmp_path):
    pytest.importorskip("tokenizers")
    bpe = tokenizers.train_bpe([path.read_text() for path in texts.iterdir()], 300)
    metadata = prepared.prepare(str(texts), bpe, tmp_path, held_out=0.2)
    kept = tokenizers.load(str(tmp_path))
    assert kept == bpe
    assert metadata.tokenizer == kept.fingerprint
    assert metadata.dtype == "<u2"
    _, held_out = prepared.read_tokens(tmp_path, metadata)
    text = kept.decode(held_out.span(0, held_out.offsets[-1]))
    assert text.encode() == b"".join(stream_of(texts, True))


def test_an_interrupted_preparation_is_refused(texts, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared.prepare(str(texts), BYTES, tmp_path, held_out=0.2)
    monkeypatch.undo()
    assert prepared.is_prepared(tmp_path)
    with pytest.raises(InputError, match="interrupted or is still running; delete the folder"):
        prepared.read_metadata(tmp_path)
    with pytest.raises(InputError, match="interrupted or is still running; delete the folder"):
        prepared.prepare(str(texts), BYTES, tmp_path)


def test_a_refused_corpus_leaves_an_unfinished_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("good")
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"b\.txt: not UTF-8 at byte 0"):
        prepared.prepare(str(tmp_path / "texts"), BYTES, tmp_path / "out")
    with pytest.raises(InputError, match="interrupted"):
        prepared.read_metadata(tmp_path / "out")


def test_folders_in_the_way_are_refused(texts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; give a new folder"):
        prepared.prepare(str(texts), BYTES, tmp_path)
    prepared.prepare(str(texts), BYTES, tmp_path / "out", held_out=0.2)
    with pytest.raises(InputError, match="already a prepared folder"):
        prepared.prepare(str(tmp_path / "out"), BYTES, tmp_path / "again")
    with pytest.raises(InputError, match="no file is there"):
        prepared.prepare(str(tmp_path / "*.missing"), BYTES, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damage_is_named(texts, tmp_path):
    metadata = prepared.prepare(str(texts), BYTES, tmp_path, held_out=0.2)
    shard = tmp_path / next(iter(metadata.train.shards))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"{shard.name}: {len(whole) - 1} bytes, expected"):
        prepared.read_tokens(tmp_path, metadata)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: missing"):
        prepared.read_tokens(tmp_path, metadata)
    shard.write_bytes(whole)
    (tmp_path / "held_out_offsets.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"held_out_offsets\.npy"):
        prepared.read_tokens(tmp_path, metadata)

    fields = dataclasses.asdict(metadata)
    for text, message in (
        ("{", "damaged"),
        ("{}", "damaged"),
        (json.dumps(fields | {"format": 99}), "format 99, expected 1"),
        (json.dumps(fields | {"train": 3}), "damaged"),
    ):
        (tmp_path / prepared.METADATA).write_text(text)
        with pytest.raises(InputError, match=message):
            prepared.read_metadata(tmp_path)


def test_a_tokenizer_is_learnt_on_what_training_sees(texts):
    pytest.importorskip("tokenizers")
    learnt = prepared.learn_tokenizer(str(texts), 300, held_out=0.2)
    seen = [data.decode() for data in stream_of(texts, False)]
    assert learnt == tokenizers.train_bpe(seen, 300)
    with pytest.raises(InputError, match="held_out=1: expected"):
        prepared.learn_tokenizer(str(texts), 300, held_out=1)
