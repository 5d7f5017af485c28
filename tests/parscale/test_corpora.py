import gzip
import hashlib
import json

import pytest
import zstandard

from parscale import corpora
from sharding.settings import InputError


def read(spec):
    return list(corpora.documents(corpora.find(str(spec))))


def content_hash(documents, held_out=None):
    split = corpora.Split("x", held_out)
    for document in documents:
        split.is_held_out(document)
    return split.finish()


def jsonl(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_pystdlib_is_the_library_without_its_tests():
    documents = read("pystdlib")
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert 8e6 < sum(len(document.data) for document in documents) < 20e6
    # 700 draws at 0.05: the share lies within 4 standard deviations (0.033) of it.
    share = sum(document.place < 0.05 for document in documents) / len(documents)
    assert abs(share - 0.05) < 0.033
    assert content_hash(documents) == content_hash(read("pystdlib"))


def test_pypackages_are_the_named_packages():
    files = corpora.find("pypackages").files
    names = [name for name, _ in files]
    assert names == sorted(set(names))
    assert {"jax/_src/core.py", "numpy/__init__.py", "flax/nnx/graph.py"} <= set(names)
    assert {name.split("/")[0] for name in names} <= set(corpora.PACKAGES)


def test_built_in_corpora_leave_out_what_is_empty_or_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "latin.py").write_bytes("# é".encode("latin-1"))
    (tmp_path / "empty.py").touch()
    (tmp_path / "good.py").write_bytes("# é".encode())
    (tmp_path / "_sysconfigdata__linux.py").write_bytes(b"x = 1")
    assert [document.name for document in read("pystdlib")] == ["good.py"]


def test_a_folder_a_glob_and_a_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/z.txt", "b.txt", "a.md", ".hidden", ".git/config"):
        (tmp_path / name).write_text(name)
    assert [d.name for d in read(tmp_path)] == ["a.md", "b.txt", "b/z.txt"]
    assert [d.name for d in read(tmp_path / "**" / "*.txt")] == ["b.txt", "b/z.txt"]
    assert [d.name for d in read(tmp_path / "b" / "z.txt")] == ["z.txt"]
    assert read(tmp_path)[0].text == "a.md"


@pytest.mark.parametrize("read_bytes", [1, 3, 1 << 20])
def test_compressed_files_and_jsonl(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(corpora, "_READ_BYTES", read_bytes)
    pack = zstandard.ZstdCompressor().compress
    lines = jsonl("first\nline", "") + b"\n" + jsonl("zweite — Zeile")
    (tmp_path / "a.jsonl").write_bytes(lines.rstrip())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:9]) + gzip.compress(lines[9:]))
    (tmp_path / "c.jsonl.zst").write_bytes(pack(lines[:9]) + pack(lines[9:]))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"text"))
    found = [(document.name, document.text) for document in read(tmp_path)]
    expected = [
        (f"{name}#{line}", text)
        for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
        for line, text in ((1, "first\nline"), (4, "zweite — Zeile"))
    ]
    assert found == [*expected, ("d.txt.gz", "text")]


def test_progress_counts_the_bytes_on_disk(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"y" * 100_000))
    corpus = corpora.find(str(tmp_path))
    seen = []
    list(corpora.documents(corpus, seen.append))
    assert sum(seen) == corpus.disk_bytes < 2000


def test_a_document_keeps_its_side_whatever_else_there_is(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    every = {d.text: d.place < 0.3 for d in read(tmp_path)}
    some = {d.text: d.place < 0.3 for d in read(tmp_path / "1*.txt")}
    assert some.items() <= every.items()
    # Binomial(200, 0.3): 60 with standard deviation 6.5.
    assert 34 < sum(every.values()) < 86
    a = corpora.Document("a", b"same")
    assert a.place == corpora.Document("elsewhere/b", b"same").place
    assert a.place == int(hashlib.sha256(b"same").hexdigest()[:16], 16) / 16**16


def test_the_hash_sees_names_contents_and_borders():
    def of(*pairs):
        return content_hash([corpora.Document(name, data) for name, data in pairs])

    hashes = [
        of(("a", b"x"), ("b", b"y")),
        of(("a", b"x"), ("c", b"y")),
        of(("a", b"x"), ("b", b"z")),
        of(("a", b"xy"), ("b", b"y")),
        of(("a", b"x")),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == of(("a", b"x"), ("b", b"y"))


def test_a_split_with_an_empty_side_names_a_share_that_works():
    documents = [corpora.Document(str(i), b"%d" % i) for i in range(5)]
    places = sorted(document.place for document in documents)
    with pytest.raises(InputError, match="none to hold out") as error:
        content_hash(documents, held_out=places[0] / 2)
    share = float(str(error.value).split("--config.data.held_out=")[1].split()[0])
    assert places[0] < share <= places[-1]
    content_hash(documents, held_out=share)
    with pytest.raises(InputError, match="none to train on"):
        content_hash(documents, held_out=(1 + places[-1]) / 2)
    with pytest.raises(InputError, match=r"of its 1 documents.*more files"):
        content_hash(documents[:1], held_out=0.5)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"abc\xe9 x", "a.txt: not UTF-8 at byte 3"),
        ("a.jsonl", jsonl("x") + b'{"text": "\xe9"}', "a.jsonl: not UTF-8 at byte 24"),
        ("a.jsonl", b"", "a.jsonl: no line has any text"),
        ("a.jsonl", jsonl("x") + b"{oops}\n", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"line 1: .*\"text\", found with the fields \['body'\]"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected an object with a string"),
        ("a.jsonl", b"[1]", r"line 1: .*found \[1\]"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "line 1: character 1 .*surrogate"),
        ("a.txt.gz", b"plain", "a.txt.gz: damaged, or not a .gz file"),
        ("a.txt.zst", b"plain", "a.txt.zst: damaged, or not a .zst file"),
        (
            "a.txt.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-4],
            "a.txt.gz: the .gz file ends too early",
        ),
        (
            "a.txt.zst",
            zstandard.ZstdCompressor().compress(bytes(range(256)))[:-4],
            "a.txt.zst: the .zst file ends too early",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("spec", ["missing.txt", "*.nothing", "."])
def test_nothing_found(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no file is there"):
        corpora.find(spec)


def test_a_misspelt_name_is_guessed():
    with pytest.raises(InputError, match='did you mean "pystdlib"'):
        corpora.find("pystdlb")
