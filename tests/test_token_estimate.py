"""How many tokens a corpus will give, against what a build makes of it."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.reader import ArrayReader
from actcache.cache.store import open_store
from actcache.jobs.corpora import measured, token_files
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.resolve import resolve
from actcache.jobs.token_estimate import TokenEstimate, estimate_tokens
from actcache.schemas.grid import token_layouts
from actcache.schemas.plan import TokensRecord

Estimate = Callable[..., TokenEstimate]


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


@pytest.fixture(scope="session")
def estimate(model: Path, tokenizer: Any) -> Estimate:
    """Estimate for a corpus and fields of a spec."""

    def run(*corpus: object, most: int = 1 << 18, **fields: Any) -> TokenEstimate:
        resolved = resolve(ac.Spec(**({"model": str(model), "corpus": tuple(map(str, corpus))} | fields)))
        assert not isinstance(resolved.corpus, ac.Capturable)
        return estimate_tokens(resolved.plan, resolved.corpus, tokenizer, most)

    return run


@pytest.fixture(scope="session")
def built_tokens(model: Path) -> Callable[..., TokensRecord]:
    """The tokens of a build of the same, and its sequences."""

    def run(folder: Path, *corpus: object, **fields: Any) -> TokensRecord:
        spec = ac.Spec(**({"model": str(model), "corpus": tuple(map(str, corpus))} | fields))
        ac.build(spec, folder, stage="tokenise")
        return TokensRecord.from_bytes((folder / ".actcache/tokens.json").read_bytes(), "tokens.json")

    return run


def stored(folder: Path, record: TokensRecord, name: str) -> np.ndarray:
    layouts = token_layouts(record.n_tokens, record.n_sequences, record.n_documents)
    return ArrayReader(open_store(folder), layouts[name]).read()


def counts(found: TokenEstimate | TokensRecord) -> tuple[int, int, int]:
    return found.n_tokens, found.n_sequences, found.n_documents


def near(found: TokenEstimate, truth: TokensRecord, within: float) -> None:
    assert not found.exact
    for guess, real in zip(counts(found), counts(truth), strict=True):
        assert abs(guess - real) <= max(1.5, within * real), (counts(found), counts(truth), found.basis)


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of many lengths, any 33 neighbours alike any others, that compress as texts do."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(1, 9))) for _ in range(2000)]
    return [" ".join(generator.choices(words, k=1 + number * 7 % 33)) for number in range(count)]


def write(folder: Path, kind: str, rows: list[str]) -> str:
    """The rows as a corpus of a kind; a pattern that finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"a.{kind}"
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    ids = [np.frombuffer(row.encode(), np.uint8).astype(np.uint16) for row in rows]
    if kind == "txt":
        for number, row in enumerate(rows):
            (folder / f"{number:06d}.txt").write_text(row)
        return str(folder / "*.txt")
    if kind == "saved":
        import datasets

        datasets.Dataset.from_dict({"text": rows}).save_to_disk(folder / "saved")
        return str(folder / "saved")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), name, row_group_size=100)
    elif kind in ("bin", "npy"):
        whole = np.concatenate([np.append(part, 0) for part in ids]).astype(np.uint16)
        name.write_bytes(whole.tobytes()) if kind == "bin" else np.save(name, whole)
    elif kind == "rows.npy":
        np.save(name, np.concatenate(ids)[: len(rows) * 60].reshape(-1, 60))
    elif kind.startswith("csv"):
        import csv
        import io

        out = io.StringIO()
        csv.writer(out).writerows([["text"], *([row] for row in rows)])
        name.write_bytes(gzip.compress(out.getvalue().encode()) if kind.endswith("gz") else out.getvalue().encode())
    else:
        packers = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
        name.write_bytes(packers[kind](lines))
    return str(name)


KINDS = [
    *("txt", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "parquet", "saved", "bin", "npy", "rows.npy"),
]  # fmt: skip


def options(kind: str) -> dict[str, Any]:
    return {"split_at_eos": True, "eos_id": 0} if kind in ("bin", "npy") else {}


@pytest.mark.parametrize("kind", KINDS)
def test_small_corpora_are_counted(kind: str, estimate: Estimate, built_tokens: Any, tmp_path: Path):
    corpus = write(tmp_path, kind, texts(60))
    record = built_tokens(tmp_path / "out", corpus, **options(kind))
    found = estimate(corpus, **options(kind))
    assert found.exact
    assert counts(found) == counts(record)
    assert found.lengths.tolist() == np.diff(stored(tmp_path / "out", record, "sequence_start")).tolist()
    ids = stored(tmp_path / "out", record, "token_id")
    whole = np.concatenate(found.sequences)
    assert np.array_equal(whole, ids[: len(whole)])
    assert [len(sequence) for sequence in found.sequences] == found.lengths[: len(found.sequences)].tolist()
    assert len(whole) <= 64 * 32 < len(whole) + found.lengths[len(found.sequences)]
    assert whole.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [False, True])
def test_a_uniform_corpus_is_told_from_its_beginning(
    kind: str, pack: bool, estimate: Estimate, built_tokens: Any, tmp_path: Path
):
    packed = kind.endswith(("gz", "zst"))  # its beginning is packed less well, with nothing yet to refer to
    most = 200_000 if packed else 30_000
    corpus = write(tmp_path, kind, texts({"txt": 1500}.get(kind, 20_000 if packed else 6000)))
    fields = {"pack": pack} | options(kind)
    record = built_tokens(tmp_path / "out", corpus, **fields)
    found = estimate(corpus, most=most, **fields)
    near(found, record, 0.05)
    assert len(found.lengths) == pytest.approx(record.n_sequences * most / record.n_tokens, rel=0.05)
    ids = stored(tmp_path / "out", record, "token_id")
    if kind == "txt":  # of many files, not the first ones are looked at
        starts = stored(tmp_path / "out", record, "sequence_start")
        there = {part.tobytes() for part in np.split(ids, starts[1:-1])}
        assert pack or all(sequence.tobytes() in there for sequence in found.sequences)
    else:
        assert np.array_equal(np.concatenate(found.sequences), ids[: sum(map(len, found.sequences))])
    again = estimate(corpus, most=most, **fields)
    assert (counts(again), again.basis) == (counts(found), found.basis)


@pytest.mark.parametrize(
    "fields",
    [
        {"bos": "always"},
        {"long": "truncate"},
        {"long": "stride", "stride": 8},
        {"min_tokens": 100},
        {"max_document_tokens": 60},
        {"pack": True, "bos": "always"},
        {"max_tokens": 150_000},
        {"max_documents": 1200},
        {"max_documents": 5000, "max_tokens": 100_000},
        {"shuffle": 3},
        {"sample": 700},
        {"shuffle": 1, "sample": 2500, "max_documents": 900},
        {"shuffle": 2, "max_tokens": 120_000},
        {"context": 7},
    ],
    ids=str,
)
def test_whatever_is_asked_of_documents(fields: dict[str, Any], estimate: Estimate, built_tokens: Any, tmp_path: Path):
    corpus = write(tmp_path, "jsonl", texts(4000))
    near(estimate(corpus, most=25_000, **fields), built_tokens(tmp_path / "out", corpus, **fields), 0.12)


@pytest.mark.parametrize(
    "fields", [{}, {"shuffle": 3, "sample": 20}, {"sample": 20}, {"shuffle": 1, "max_tokens": 500}]
)
@pytest.mark.parametrize("limits", [{}, {"max_documents": 15}, {"max_tokens": 700}], ids=str)
def test_limits_that_are_near_are_exact(
    fields: dict[str, Any], limits: dict[str, Any], estimate: Estimate, built_tokens: Any, tmp_path: Path
):
    corpus = write(tmp_path, "jsonl", texts(60))
    found = estimate(corpus, **(fields | limits))
    assert found.exact
    assert counts(found) == counts(built_tokens(tmp_path / "out", corpus, **(fields | limits)))


def test_a_limit_ends_the_reading_of_a_large_corpus(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    corpus = write(tmp_path, "jsonl", texts(4000))
    for number, fields in enumerate(({"max_tokens": 5000}, {"max_documents": 50})):
        found = estimate(corpus, most=20_000, **fields)
        assert found.exact
        assert counts(found) == counts(built_tokens(tmp_path / str(number), corpus, **fields))


@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=40),
    most=st.integers(1, 400),
    context=st.integers(2, 32),
    pack=st.booleans(),
    bos=st.sampled_from(["tokenizer", "always", "never"]),
    shuffle=st.none() | st.integers(0, 5),
    max_documents=st.none() | st.integers(1, 50),
    max_tokens=st.none() | st.integers(1, 3000),
    kind=st.sampled_from(["jsonl", "jsonl.zst", "jsonl.gz", "parquet"]),
)
def test_whatever_is_read_the_numbers_hang_together(
    lengths: list[int], most: int, context: int, kind: str, estimate: Estimate, tmp_path_factory: Any, **fields: Any
):
    folder = tmp_path_factory.mktemp("any")
    corpus = write(folder, kind, ["x" * length for length in lengths])
    fields |= {"context": context}
    if not any(lengths):
        with pytest.raises(ac.InvalidInput, match="no tokens"):
            estimate(corpus, most=most, **fields)
        return
    truth = estimate(corpus, most=1 << 20, **fields)
    found = estimate(corpus, most=most, **fields)
    assert truth.exact
    if found.exact:
        assert counts(found) == counts(truth)
    if truth.n_tokens < most:
        assert found.exact or fields["shuffle"] is not None
    assert found.n_sequences >= 1
    assert found.n_documents >= 1
    assert found.n_tokens <= found.n_sequences * context
    assert fields["max_tokens"] is None or found.n_tokens <= fields["max_tokens"]
    assert fields["max_documents"] is None or found.n_documents <= fields["max_documents"]
    assert all(1 <= length <= context for length in found.lengths)
    assert found.lengths.sum() <= max(most + context, truth.n_tokens)


# Corpora of odd shapes


def test_less_than_what_is_unpacked_at_once(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    """A block of zstd is 128 KiB of text: from 1000 tokens of it nothing follows, so more is read."""
    corpus = write(tmp_path, "jsonl.zst", texts(20_000))
    found = estimate(corpus, most=1000)
    near(found, built_tokens(tmp_path / "out", corpus), 0.15)
    assert len(found.lengths) > 1000


@pytest.mark.parametrize("kind", ["txt", "bin", "npy"])
def test_one_huge_document(
    kind: str, estimate: Estimate, built_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 4096)
    corpus = write(tmp_path, kind, [" ".join(texts(14_000))])
    record = built_tokens(tmp_path / "out", corpus)
    near(estimate(corpus, most=20_000), record, 0.005)
    near(estimate(corpus, most=20_000, pack=True), record, 0.005)
    assert record.n_documents == 1


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv.gz", "parquet"])
def test_one_huge_line_after_short_ones(kind: str, estimate: Estimate, built_tokens: Any, tmp_path: Path):
    corpus = write(tmp_path / kind, kind, ["short", "one", " ".join(texts(14_000)), "end"])
    found, truth = estimate(corpus, most=20_000), built_tokens(tmp_path / "out", corpus)
    # of a Parquet file it is known that three of four rows were begun, and nothing of how long the fourth is
    assert found.n_tokens == pytest.approx(truth.n_tokens * (4 / 3 if kind == "parquet" else 1), rel=0.02)
    assert not found.exact


def test_many_small_files_and_a_few_large_ones(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    rows = texts(3000)
    for number, begin in enumerate(range(0, 3000, 300)):
        write(tmp_path / f"{number}", "jsonl.zst" if number % 2 else "jsonl", rows[begin : begin + 300])
    corpus = [tmp_path / "*/*.jsonl"]
    near(estimate(*corpus, most=50_000), built_tokens(tmp_path / "out", *corpus), 0.05)


@pytest.mark.parametrize("fields", [{}, {"pack": True}, {"sample": 200}, {"max_tokens": 200_000}], ids=str)
def test_files_that_change_with_their_names(
    fields: dict[str, Any], estimate: Estimate, built_tokens: Any, tmp_path: Path
):
    """Later files have longer texts, and less beside them."""
    generator = random.Random(1)
    for number in range(200):
        rows = [
            {"text": "x" * generator.randint(1, 2 + number), "more": "y" * generator.randint(1, 202 - number)}
            for _ in range(20)
        ]
        (tmp_path / f"{number:03d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = built_tokens(tmp_path / "out", tmp_path / "*.jsonl", **fields)
    near(estimate(tmp_path / "*.jsonl", most=40_000, **fields), record, 0.2)


def test_the_first_documents_are_not_like_the_rest(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    for number in range(400):
        (tmp_path / f"{number:03d}.txt").write_text("x" * (1 + number))
    record = built_tokens(tmp_path / "out", tmp_path / "*.txt", max_documents=120)
    found = estimate(tmp_path / "*.txt", most=5000, max_documents=120)
    assert found.n_documents == 120
    assert found.n_tokens == pytest.approx(record.n_tokens, rel=0.3)
    whole = estimate(tmp_path / "*.txt", most=10_000)
    assert whole.n_documents == 400
    assert whole.n_tokens == pytest.approx(400 * 401 / 2, rel=1e-3)


def test_many_tiny_token_files(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    for number in range(400):
        np.save(tmp_path / f"{number:03d}.npy", np.full(40, 5, np.int32))
    record = built_tokens(tmp_path / "out", tmp_path / "*.npy")
    found = estimate(tmp_path / "*.npy", most=2000)
    near(found, record, 0.01)


def test_one_row_group_and_one_batch(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    """All rows come at once, and what is read is told by their count."""
    rows = texts(5000)
    table = pyarrow.table({"text": rows, "more": ["y" * 500] * len(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "one.parquet", row_group_size=len(rows), compression="zstd")
    near(estimate(tmp_path / "one.parquet", most=20_000), built_tokens(tmp_path / "a", tmp_path / "one.parquet"), 0.1)


def test_more_rows_than_bytes(estimate: Estimate, tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["same"] * 200_000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    found = estimate(tmp_path / "a.parquet", most=1000)
    assert found.n_documents == pytest.approx(200_000, rel=0.01)
    assert found.n_tokens == pytest.approx(800_000, rel=0.01)


def test_rows_that_cannot_be_used_count_as_read(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    rows = [json.dumps({"text": row} if i % 3 else {"other": row}) for i, row in enumerate(texts(6000))]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    near(estimate(tmp_path / "a.jsonl", most=20_000), built_tokens(tmp_path / "out", tmp_path / "a.jsonl"), 0.1)
    with pytest.raises(ac.InvalidInput, match=r"line 1: no text in field 'text'"):
        estimate(tmp_path / "a.jsonl", strict=True)


def test_token_lists_and_conversations(estimate: Estimate, built_tokens: Any, tmp_path: Path):
    rows = [{"ids": list(row.encode())} for row in texts(4000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    near(
        estimate(tmp_path / "a.jsonl", most=20_000, tokens_field="ids"),
        built_tokens(tmp_path / "out", tmp_path / "a.jsonl", tokens_field="ids"),
        0.1,
    )


def test_where_nobody_says_how_large_it_is_all_is_read(
    estimate: Estimate, model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = write(tmp_path, "jsonl", texts(1000))
    truth = estimate(corpus)
    resolved = resolve(ac.Spec(model=str(model), corpus=(corpus,)))
    (file,) = resolved.corpus.parts  # type: ignore[union-attr]
    from dataclasses import replace

    unknown = replace(file, source=file.source.model_copy(update={"bytes": None}))
    corpus_of_unknown = replace(resolved.corpus, parts=(unknown,))
    found = estimate_tokens(resolved.plan, corpus_of_unknown, tokenizer, 1000)
    assert (found.exact, counts(found)) == (True, counts(truth))
    assert "nobody says how large" in found.basis
    assert "nobody" not in truth.basis


def test_what_cannot_be_estimated(estimate: Estimate, tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ac.InvalidInput, match=r"a\.txt: the file is empty"):
        estimate(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ac.InvalidInput, match="most_tokens is 0"):
        estimate(tmp_path / "b.txt", most=0)


def test_no_more_is_read_than_needed(estimate: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path, "jsonl", texts(100_000))
    read = 0
    inner = measured._Raw.readinto

    def counting(self: Any, buffer: memoryview) -> int:
        nonlocal read
        size = inner(self, buffer)
        read += size
        return size

    monkeypatch.setattr(measured._Raw, "readinto", counting)
    estimate(corpus, most=10_000)
    whole = Path(corpus).stat().st_size
    assert 10_000 < read < whole / 3


def test_memory_is_bounded(estimate: Estimate, tmp_path: Path):
    corpus = write(tmp_path, "jsonl", texts(60_000))
    size = Path(corpus).stat().st_size
    estimate(corpus, most=1000)  # what is loaded once
    tracemalloc.start()
    found = estimate(corpus, most=1 << 16, max_documents=60_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not found.exact
    assert peak < max(size, 30 << 20)


# Corpora elsewhere


def test_files_behind_a_server(estimate: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1", prepend=",")
    corpus = Path(write(tmp_path / "web", "jsonl.gz", texts(10_000)))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(corpus.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        there = estimate(f"http://127.0.0.1:{server.server_port}/{corpus.name}", most=100_000)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    here = estimate(corpus, most=100_000)
    assert (counts(there), there.basis, there.exact) == (counts(here), here.basis, False)


HUB_SCRIPT = """
import sys, actcache as ac
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.resolve import resolve
from actcache.jobs.token_estimate import estimate_tokens
resolved = resolve(ac.Spec(model=sys.argv[1], corpus=("hf://datasets/org/name",)))
found = estimate_tokens(resolved.plan, resolved.corpus, load_tokenizer(sys.argv[1]), 10_000)
print(found.n_tokens, found.n_documents, found.exact, found.basis, sep="|")
"""
CARD = "---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: data/*}]\n"


@pytest.mark.parametrize("told", [True, False])
def test_a_hub_dataset_goes_by_its_rows_where_they_are_told(told: bool, model: Path, tmp_path: Path):
    from tests.hub_server import serving

    rows, files = texts(3000), {"README.md": CARD.encode() + b"---\n"}
    if told:
        info = "dataset_info:\n  features: [{name: text, dtype: string}]\n  splits:\n  - {name: train, num_bytes: 1, "
        files["README.md"] = f"{CARD}{info}num_examples: 3000}}\n---\n".encode()
    for number in range(2):
        name = write(tmp_path / f"{number}", "parquet", rows[number * 1500 :][:1500])
        files[f"data/{number}.parquet"] = Path(name).read_bytes()
    with serving("a" * 40, files) as (endpoint, requests):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", HUB_SCRIPT, str(model)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    tokens, documents, exact, basis = done.stdout.strip().split("|")
    assert exact == str(not told)
    assert int(tokens) == pytest.approx(sum(map(len, rows)), rel=0.05 if told else 0)
    assert int(documents) == pytest.approx(3000, rel=0.01 if told else 0)
    assert ("of the corpus's rows" in basis, "nobody says" in basis) == (told, not told)
    assert any("data/0.parquet" in request for request in requests)
