import sys

import numpy as np
import pytest

from parscale import tokenizers
from sharding.settings import InputError

TEXTS = ["", "plain", "naïve — 東京 🗼🗼 e\u0301", "\ufffd kept \ufffd", "\0\r\n\t", " spaces  "]
SOURCE = "\n".join(f"def f_{i}(x):\n    return x + {i}  # naïve 東京 🗼" for i in range(200))


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return tokenizers.train_bpe([SOURCE], 320)


def stream(tokenizer, ids):
    decoder = tokenizers.StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    return pieces, decoder.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    tokenizer = tokenizers.load("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 256


def test_bytes_decode_whatever_a_model_says():
    tokenizer = tokenizers.load("bytes")
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert tokenizer.decode([0x61, 300, 0x62]) == "a\ufffdb"


@pytest.mark.parametrize("text", [*TEXTS, SOURCE])
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode(ids) == text
    assert len(ids) <= len(text.encode())
    assert (ids < bpe.vocab_size).all()


def test_bpe_merges_shorten_what_they_were_learnt_on(bpe):
    assert 256 < bpe.vocab_size <= 320
    assert len(bpe.encode(SOURCE)) < 0.6 * len(SOURCE.encode())


def test_bpe_training_saving_and_loading_give_one_fingerprint(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    again = tokenizers.train_bpe([SOURCE], 320)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(str(spec))
        assert loaded == bpe == again
        assert loaded.fingerprint == bpe.fingerprint == again.fingerprint
    assert tokenizers.train_bpe([SOURCE], 300).fingerprint != bpe.fingerprint
    assert tokenizers.load("bytes").fingerprint != bpe.fingerprint


def test_a_files_truncation_and_padding_do_not_apply(bpe):
    library = pytest.importorskip("tokenizers")
    cut = library.Tokenizer.from_str(bpe.json)
    cut.enable_truncation(4)
    cut.enable_padding(length=50)
    np.testing.assert_array_equal(
        tokenizers.BPETokenizer(cut.to_str()).encode(SOURCE), bpe.encode(SOURCE)
    )


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_streamed_text_is_the_decoded_text(kind, request):
    tokenizer = tokenizers.load("bytes") if kind == "bytes" else request.getfixturevalue("bpe")
    random = np.random.default_rng(0)
    cases = [tokenizer.encode(text) for text in (*TEXTS, SOURCE[:500])]
    # Byte sequences of every kind: whole characters, halves, stray continuations, surrogates.
    pieces = [b"a", "é".encode(), "東".encode(), "🗼".encode(), b"\x80", b"\xf0\x9f", b"\xed\xa0"]
    for _ in range(100):
        mixed = b"".join(pieces[i] for i in random.integers(0, len(pieces), 40))
        cases.append(np.frombuffer(mixed, np.uint8) if kind == "bytes" else None)
        cases.append(random.integers(0, tokenizer.vocab_size, 60))
    for ids in cases:
        if ids is not None:
            printed, rest = stream(tokenizer, ids)
            assert "".join(printed) + rest == tokenizer.decode(ids)


def test_streaming_prints_whole_characters_at_once():
    pieces, rest = stream(tokenizers.load("bytes"), "aé🗼b".encode())
    assert pieces == ["a", "", "é", "", "", "", "🗼", "b"]
    assert rest == ""
    assert stream(tokenizers.load("bytes"), "🗼".encode()[:3]) == (["", "", ""], "\ufffd")


def test_grouped_encoding_keeps_order(monkeypatch):
    monkeypatch.setattr(tokenizers, "_GROUP_CHARACTERS", 10)
    tokenizer = tokenizers.load("bytes")
    items = [(i, "x" * (i % 7)) for i in range(50)]
    found = [(i, len(ids)) for i, ids in tokenizers.encode_stream(tokenizer, iter(items))]
    assert found == [(i, i % 7) for i in range(50)]
    assert list(tokenizers.encode_stream(tokenizer, [])) == []


def test_bad_tokenizers_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match=r"no such file.*did you mean \"bytes\""):
        tokenizers.load("byte")
    for data in (b"{}", b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            tokenizers.load(str(tmp_path))
    with pytest.raises(InputError, match="vocab_size=255: expected at least 256"):
        tokenizers.train_bpe(["x"], 255)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"pip install 'parscale\[bpe\]'"):
        tokenizers.load(str(tmp_path))
    with pytest.raises(InputError, match=r"parscale\[bpe\]"):
        tokenizers.train_bpe(["x"], 300)
