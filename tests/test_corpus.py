"""Corpora and tokenising: every text is found, in order, whole; what cannot be read is named."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.jobs.batches import batches, touching, with_tokens
from actcache.jobs.corpora.corpus import Corpus, open_corpus
from actcache.jobs.corpora.document import BadRow, Document
from actcache.jobs.fingerprint import file_sha256
from actcache.jobs.grouping import recomputed_fraction
from actcache.jobs.memory import memory_path
from actcache.schemas.plan import BatchRule

ROWS = ["first row", "", "second\nrow with \u2028 and 🦜", "third"]


def opened(*patterns: str, **fields: Any) -> Corpus:
    return open_corpus(ac.Spec(model="m", corpus=patterns, **fields))


def documents(*patterns: str, **fields: Any) -> list[Document | BadRow]:
    return list(opened(*patterns, **fields).documents())


def bad_rows(*patterns: str, **fields: Any) -> list[tuple[int, str]]:
    return [(row.row, row.reason) for row in documents(*patterns, **fields) if isinstance(row, BadRow)]


def write_jsonl(path: Path, field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, field: text}, ensure_ascii=False) + "\n" for i, text in enumerate(ROWS)) + "\n"
    data = lines.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data[:50]) + zstandard.compress(data[50:])  # frames may follow each other
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_rows_are_documents(tmp_path: Path, name: str):
    corpus = opened(str(write_jsonl(tmp_path / name, "body")), text_field="body")
    assert corpus.kind == "jsonl"
    read = list(corpus.documents())
    assert [(d.row, d.content) for d in read if isinstance(d, Document)] == [(i, t) for i, t in enumerate(ROWS) if t]
    assert [(d.row, d.reason) for d in read if isinstance(d, BadRow)] == [(1, "empty")]


def test_text_files_are_documents_byte_for_byte(tmp_path: Path):
    texts = {"b/1.txt": "x\r\ny", "b/c/2.txt": "\ufeff", "a.txt": "é\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text.encode())
    corpus = opened(str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt"))
    assert [source.name for source in corpus.sources] == ["a.txt", "b/1.txt", "b/c/2.txt"]
    assert [d.content for d in corpus.documents() if isinstance(d, Document)] == [
        texts[source.name] for source in corpus.sources
    ]


def test_the_identity_is_of_content_and_order(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("alpha")
        (tmp_path / folder / "b.txt").write_text("beta")
    one = opened(f"{tmp_path}/one/*.txt").identity()
    assert opened(f"{tmp_path}/two/*.txt").identity() == one
    assert opened(f"{tmp_path}/one/b.txt", f"{tmp_path}/one/a.txt").identity() != one
    (tmp_path / "two" / "a.txt").write_text("alpha!")
    assert opened(f"{tmp_path}/two/*.txt").identity() != one


BAD = [
    (
        b'{"text": "ok"}\n{"text": 3}\n',
        "wrong type",
        r"a\.jsonl, line 2: no text in field 'text' \(it holds int; there is: text\)",
    ),
    (b'{"body": "x"}\n', "field missing", r"there is: body\); choose with --text-field"),
    (b'{"text": null}\n', "field missing", r"line 1: no text in field 'text'"),
    (b"[1]\n", "wrong type", r"line 1: no text .*list"),
    (b'{"text": "x"\n', "not JSON", r"a\.jsonl, line 1: not JSON"),
    (b'{"text": "\xff"}\n', "not UTF-8", r"line 1: not UTF-8 text: .* at byte 10"),
    (b'{"text": ""}\n', "empty", r"line 1: field 'text' is empty"),
    (b'{"text": "\\ud800"}', "half a surrogate pair", r"line 1: .*half of a surrogate pair"),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON", r"a\.jsonl, line 1"),
]


@pytest.mark.parametrize(("data", "reason", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_row_is_named_with_its_reason(tmp_path: Path, data: bytes, reason: str, says: str):
    (tmp_path / "a.jsonl").write_bytes(data)
    (row,) = (row for row in documents(str(tmp_path / "a.jsonl")) if isinstance(row, BadRow))
    assert row.reason == reason
    assert re.search(says, row.message)


def test_a_file_that_is_no_utf_8_is_a_bad_row(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (row,) = documents(str(tmp_path / "a.txt"))
    assert isinstance(row, BadRow)
    assert re.search(r"a\.txt: not UTF-8 text: .* at byte 0", row.message)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"not gzip", "a.jsonl.gz"),
        (gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-20], "a.jsonl.gz"),
        (b"not zstd", "a.jsonl.zst"),
        (b"not gzip", "a.csv.gz"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, data: bytes, name: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ac.InvalidInput, match=rf"{re.escape(name)}: cannot be read"):
        documents(str(tmp_path / name))


def test_patterns_that_find_nothing_usable(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    write_jsonl(tmp_path / "a.jsonl")
    for pattern, says in (
        ("*.md", "no such file"),
        ("absent.txt", "no such file"),
        (".", "a folder, and no dataset .*; give a glob"),
        ("*", "mixes jsonl and text"),
        ("ftp://x/*.txt", "local files, s3://"),
    ):
        where = pattern if "://" in pattern else str(tmp_path / pattern)
        with pytest.raises(ac.InvalidInput, match=says):
            opened(where)
    with pytest.raises(ac.InvalidInput, match="no corpus"):
        opened()


def test_hashes_are_remembered_and_noticed_when_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    (first,) = file_sha256([path])
    opened: list[str] = []
    original = open
    monkeypatch.setattr("builtins.open", lambda name, *a, **k: opened.append(str(name)) or original(name, *a, **k))
    assert file_sha256([path, path]) == [first, first]
    assert str(path) not in opened
    path.write_bytes(b"two")
    assert file_sha256([path]) != [first]
    assert str(path) in opened
    memory_path().write_bytes(b"this is no database")
    assert file_sha256([path]) == file_sha256([path])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 25), st.integers(1, 5))
def test_blocks_keep_every_token_once_and_run_what_touches_them(lengths: list[int], block: int, size: int):
    start = np.append(0, np.cumsum(lengths)).astype(np.int64)
    total = int(start[-1])
    ids = np.arange(total, dtype=np.int32)
    kept: list[int] = []
    run = 0
    for low in range(0, total, block):
        high = min(low + block, total)
        wanted = touching(start, low, high)
        offset = int(start[wanted.start])
        for plain in batches(BatchRule(size=size, pad_token_id=0), start, low, high):
            batch = with_tokens(plain, 0, ids[offset:], offset)
            assert batch.input_ids.shape == batch.attention_mask.shape == batch.keep.shape
            assert len(batch.sequences) <= size
            assert batch.attention_mask.sum(dim=1).tolist() == batch.lengths.tolist()
            assert not batch.input_ids[batch.attention_mask == 0].any()
            kept += batch.input_ids[batch.keep].tolist()
            run += int(batch.attention_mask.sum())
    assert kept == list(range(total))
    assert recomputed_fraction(start, total, block) <= (run - total) / total + 1e-12
    if block >= max(lengths):
        assert recomputed_fraction(start, total, block) == pytest.approx((run - total) / total)


def test_empty_corpora_and_foreign_tokenizers_are_refused(tmp_path: Path, model: Path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ac.InvalidInput, match="no tokens"):
        ac.build(ac.Spec(model=str(model), corpus=(str(tmp_path / "empty.txt"),)), tmp_path / "a")
    import shutil

    small = Path(shutil.copytree(model, tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    moved = {token: index + 1000 for token, index in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = moved
    tokenizer["added_tokens"][0]["id"] += 1000
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ac.InvalidInput, match=rf"beyond the model's vocabulary of {config['vocab_size']}"):
        ac.build(ac.Spec(model=str(small), corpus=(str(tmp_path / "x.txt"),)), tmp_path / "b")


def test_a_file_that_changes_after_the_plan_is_refused(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    rows = opened(str(tmp_path / "*.txt")).documents()
    first = next(rows)
    assert isinstance(first, Document)
    assert first.content == "a.txt"
    (tmp_path / "b.txt").write_text("other")
    with pytest.raises(ac.InvalidInput, match=r"b\.txt: the file changed"):
        next(rows)


def test_a_zst_file_that_ends_within_a_frame_is_refused(tmp_path: Path):
    rows = "".join(json.dumps({"text": f"row {i} {i * 7919}"}) + "\n" for i in range(20_000)).encode()
    packer = zstandard.ZstdCompressor().compressobj()
    data = packer.compress(rows[:100_000]) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    cut = len(data)
    data += packer.compress(rows[100_000:]) + packer.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(data)
    assert len(documents(str(path))) == 20_000
    for bad in (data[:cut], data[:10], b""):
        path.write_bytes(bad)
        with pytest.raises(ac.InvalidInput, match="ends too soon"):
            documents(str(path))


def test_file_names_that_are_no_text(tmp_path: Path):
    import os

    name = os.fsencode(tmp_path) + b"/\xff \n[x].txt"
    with open(name, "wb") as file:
        file.write(b"hello")
    corpus = opened(str(tmp_path / "*.txt"))
    assert [d.content for d in corpus.documents() if isinstance(d, Document)] == ["hello"]
    assert corpus.sources[0].to_bytes()


def test_a_corpus_that_changes_under_max_tokens_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.txt"
    path.write_text("a" * 500)
    original = Path.read_bytes

    def rewritten(self: Path) -> bytes:
        data = original(self)
        if self == path:
            path.write_text("b" * 400)
        return data

    monkeypatch.setattr(Path, "read_bytes", rewritten)
    with pytest.raises(ac.InvalidInput, match="changed"):
        ac.build(ac.Spec(model=str(model), corpus=(str(path),), max_tokens=100), tmp_path / "ds")
    assert not (tmp_path / "ds/token_id").exists()
