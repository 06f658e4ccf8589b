"""Corpora and tokenising: every text is found, in order, whole; what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.jobs.batches import batches, recomputed_fraction, touching
from actcache.jobs.corpus import open_corpus
from actcache.jobs.fingerprint import file_sha256
from actcache.jobs.memory import memory_path
from actcache.jobs.tokenise import Axis
from actcache.schemas.plan import BatchRule

ROWS = ["first row", "", "second\nrow with \u2028 and 🦜", "third"]


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
    corpus = open_corpus((str(write_jsonl(tmp_path / name, "body")),), "body")
    assert corpus.kind == "jsonl"
    assert [(d.source, d.row, d.text) for d in corpus.documents()] == [(0, i, text) for i, text in enumerate(ROWS)]


def test_text_files_are_documents_byte_for_byte(tmp_path: Path):
    texts = {"b/1.txt": "x\r\ny", "b/c/2.txt": "", "a.txt": "é\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text.encode())
    corpus = open_corpus((str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")), "text")
    assert [source.name for source in corpus.sources] == ["a.txt", "b/1.txt", "b/c/2.txt"]
    assert [d.text for d in corpus.documents()] == [texts[source.name] for source in corpus.sources]


def test_the_identity_is_of_content_and_order(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("alpha")
        (tmp_path / folder / "b.txt").write_text("beta")
    one = open_corpus((f"{tmp_path}/one/*.txt",), "text").identity()
    assert open_corpus((f"{tmp_path}/two/*.txt",), "text").identity() == one
    assert open_corpus((f"{tmp_path}/one/b.txt", f"{tmp_path}/one/a.txt"), "text").identity() != one
    (tmp_path / "two" / "a.txt").write_text("alpha!")
    assert open_corpus((f"{tmp_path}/two/*.txt",), "text").identity() != one


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b'{"text": "ok"}\n{"text": 3}\n', "a.jsonl", r"a\.jsonl, line 2: no text in field 'text' \(there is: text\)"),
        (b'{"body": "x"}\n', "a.jsonl", r"there is: body\); choose with --text-field"),
        (b"[1]\n", "a.jsonl", r"line 1: no text .*list"),
        (b'{"text": "x"\n', "a.jsonl", r"a\.jsonl, line 1: not JSON"),
        (b"\xff\xfe", "a.txt", r"a\.txt: not UTF-8 text: .* at byte 0"),
        (b"not gzip", "a.jsonl.gz", r"a\.jsonl\.gz: cannot be read"),
        (gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-20], "a.jsonl.gz", r"a\.jsonl\.gz: cannot be read"),
        (b"not zstd", "a.jsonl.zst", r"a\.jsonl\.zst: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, data: bytes, name: str, says: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ac.InvalidInput, match=says):
        list(open_corpus((str(tmp_path / name),), "text").documents())


def test_patterns_that_find_nothing_usable(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    write_jsonl(tmp_path / "a.jsonl")
    for pattern, says in (
        ("*.md", "no such file"),
        ("absent.txt", "no such file"),
        (".", "a folder; give a glob"),
        ("*", "mixes JSONL"),
        ("s3://x/*.txt", "local files"),
    ):
        where = pattern if "://" in pattern else str(tmp_path / pattern)
        with pytest.raises(ac.InvalidInput, match=says):
            open_corpus((where,), "text")
    with pytest.raises(ac.InvalidInput, match="no corpus"):
        open_corpus((), "text")


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


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_the_token_axis_of_any_documents(lengths: list[int], context: int, data: st.DataObject):
    """Built the plain way, token by token, it is what the vectorised arrays say."""
    total = sum(lengths)
    if total == 0:
        return
    plain = [
        (document, position, position % context, position == 0 or position % context == 0)
        for document, length in enumerate(lengths)
        for position in range(length)
    ]
    starts = np.cumsum(lengths) - lengths
    pieces = [np.arange(s, s + n, context) for s, n in zip(starts, lengths, strict=True)]
    sequence_start = np.append(np.concatenate(pieces), total).astype(np.int64)
    ids = np.arange(total, dtype=np.int32) % 5
    axis = Axis(ids, starts.astype(np.int64), sequence_start, np.zeros((len(lengths), 2), np.int64), 1, 1)
    low = data.draw(st.integers(0, total))
    high = data.draw(st.integers(low, total))
    assert axis.rows("document", low, high).tolist() == [p[0] for p in plain[low:high]]
    assert axis.rows("document_position", low, high).tolist() == [p[1] for p in plain[low:high]]
    assert axis.rows("position", low, high).tolist() == [p[2] for p in plain[low:high]]
    sequences = np.cumsum([p[3] for p in plain]) - 1
    assert axis.rows("sequence", low, high).tolist() == sequences[low:high].tolist()
    assert axis.rows("special", low, high).tolist() == [3 if i % 5 == 1 else 0 for i in range(low, high)]
    assert sequence_start.tolist() == [*np.flatnonzero([p[3] for p in plain]).tolist(), total]


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
        for batch in batches(BatchRule(size=size, pad_token_id=0), start, ids[offset:], offset, low, high):
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
    corpus = open_corpus((str(tmp_path / "*.txt"),), "text")
    documents = corpus.documents()
    assert next(documents).text == "a.txt"
    (tmp_path / "b.txt").write_text("other")
    with pytest.raises(ac.InvalidInput, match=r"b\.txt: the file changed"):
        next(documents)


def test_a_zst_file_that_ends_within_a_frame_is_refused(tmp_path: Path):
    rows = "".join(json.dumps({"text": f"row {i} {i * 7919}"}) + "\n" for i in range(20_000)).encode()
    packer = zstandard.ZstdCompressor().compressobj()
    data = packer.compress(rows[:100_000]) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    cut = len(data)
    data += packer.compress(rows[100_000:]) + packer.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(data)
    assert len(list(open_corpus((str(path),), "text").documents())) == 20_000
    for bad in (data[:cut], data[:10], b""):
        path.write_bytes(bad)
        with pytest.raises(ac.InvalidInput, match="ends too soon"):
            list(open_corpus((str(path),), "text").documents())


@pytest.mark.parametrize("line", [b'{"text": "\\ud800"}', b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
def test_rows_that_python_chokes_on(tmp_path: Path, line: bytes):
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(ac.InvalidInput, match=r"a\.jsonl, line 1"):
        list(open_corpus((str(tmp_path / "a.jsonl"),), "text").documents())


def test_file_names_that_are_no_text(tmp_path: Path):
    import os

    name = os.fsencode(tmp_path) + b"/\xff \n[x].txt"
    with open(name, "wb") as file:
        file.write(b"hello")
    corpus = open_corpus((str(tmp_path / "*.txt"),), "text")
    assert [d.text for d in corpus.documents()] == ["hello"]
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
