"""Corpora of every kind, as a user has them, and as an adversary would make them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.store import open_store
from actcache.clients.cli import main
from actcache.jobs import collect as collecting
from actcache.jobs.corpora import columns, token_files
from actcache.jobs.corpora.corpus import open_corpus
from actcache.jobs.corpora.document import BadRow, Document
from actcache.jobs.encode import load_tokenizer
from actcache.jobs.resolve import resolve
from actcache.jobs.tokenise import tokenise
from actcache.schemas.grid import token_layouts
from actcache.schemas.plan import TokensRecord

TEXTS = ["first", "", "second\nwith \u2028 and 🦜", "third"]
USED = [0, 2, 3]


class Tokens:
    """What tokenising stored: every array, the record, and what was noted."""

    def __init__(self, folder: Path, record: TokensRecord, notes: list[str]) -> None:
        from actcache.cache.reader import ArrayReader

        self.record, self.notes = record, notes
        layouts = token_layouts(record.n_tokens, record.n_sequences, record.n_documents)
        self.arrays = {name: ArrayReader(open_store(folder), layout).read() for name, layout in layouts.items()}

    def documents(self) -> list[list[int]]:
        """The ids of each document, put together from the positions."""
        found: list[dict[int, int]] = [{} for _ in range(self.record.n_documents)]
        names = ("token_id", "document", "document_position")
        for token, document, position in zip(*(self.arrays[name].tolist() for name in names), strict=True):
            if position >= 0:
                found[document][position] = token
        return [[ids[i] for i in sorted(ids)] for ids in found]

    def sequences(self) -> list[list[int]]:
        start = self.arrays["sequence_start"]
        return [self.arrays["token_id"][a:b].tolist() for a, b in pairwise(start)]

    def rows(self) -> list[tuple[int, int]]:
        return [(int(source), int(row)) for source, row in self.arrays["document_row"]]


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


@pytest.fixture
def tokens(model: Path, tokenizer: Any, tmp_path: Path):
    """Tokenise a corpus with the random model; the tokenizer gives a token a byte."""
    count = iter(range(1000))

    def run(*corpus: object, **fields: Any) -> Tokens:
        folder = tmp_path / f"tokens-{next(count)}"
        resolved = resolve(ac.Spec(**({"model": str(model), "corpus": tuple(map(str, corpus))} | fields)))
        notes: list[str] = []
        has = resolved.plan.spec.tokenizer is not None
        with ThreadPoolExecutor(2) as pool:
            record = tokenise(
                open_store(folder), resolved.plan, resolved.corpus, lambda: tokenizer if has else None, pool,
                lambda _: None, notes.append,
            )  # fmt: skip
        return Tokens(folder, record, notes)

    return run


def write(path: Path, texts: list[str], field: str = "text") -> Path:
    """The texts as a file of the kind that its name says."""
    data = b""
    if ".jsonl" in path.name:
        data = "".join(json.dumps({"n": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    elif ".csv" in path.name:
        import csv
        import io

        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerows([["n", field], *([i, text] for i, text in enumerate(texts))])
        data = out.getvalue().encode()
    else:
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), field: texts}), path, row_group_size=3)
        return path
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.csv.zst", "a.parquet"]
)
def test_a_row_is_a_document_whatever_the_file(tokens, tokenizer, tmp_path: Path, name: str):
    path = write(tmp_path / name, TEXTS, "body")
    made = tokens(path, text_field="body")
    assert made.documents() == [tokenizer(TEXTS[i])["input_ids"] for i in USED]
    assert made.rows() == [(0, i) for i in USED]
    assert made.record.skipped == {"empty": 1}
    assert len(made.notes) == 1
    assert "1 rows were skipped (1 empty)" in made.notes[0]
    kind = name.split(".")[1]
    assert open_corpus(ac.Spec(model="m", corpus=(str(path),), text_field="body")).identity().kind == kind


def test_rows_of_several_files_lead_back_to_them(tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(columns, "ROWS_AT_ONCE", 2)
    first = write(tmp_path / "a.parquet", ["one", "two", "three", "four", "five"])
    second = write(tmp_path / "b.parquet", ["six"])
    made = tokens(second, first)
    assert made.rows() == [(0, 0), *((1, i) for i in range(5))]
    glob = tokens(tmp_path / "*.parquet")
    assert glob.rows() == [*((0, i) for i in range(5)), (1, 0)]


ODD_CSV = b'\xef\xbb\xbfn,text\r\n1,"a ""quoted"", two\r\nlines"\r\n2\r\n\r\n3,\xff\r\n4,ok,too,many\r\n5,"bad"x\r\n6,fine\r\n'


def test_csv_as_people_write_it(tokens, tokenizer, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(ODD_CSV)
    made = tokens(tmp_path / "a.csv")
    assert made.documents() == [tokenizer(text)["input_ids"] for text in ('a "quoted", two\r\nlines', "ok", "fine")]
    assert made.rows() == [(0, 0), (0, 3), (0, 5)]
    assert made.record.skipped == {"field missing": 1, "not UTF-8": 1, "not CSV": 1}
    (tmp_path / "b.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert tokens(tmp_path / "b.csv").record.n_tokens == 200_000


def test_columns_as_people_write_them(tokens, tokenizer, tmp_path: Path):
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", None, "b"], kind)}), path)
        made = tokens(path)
        assert (made.documents(), made.record.skipped) == (
            [tokenizer("a")["input_ids"], tokenizer("b")["input_ids"]],
            {"field missing": 1},
        )
    raw = pyarrow.array([b"ok", b"\xff"], pyarrow.binary())
    bad = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    assert tokens(tmp_path / "bad.parquet").record.skipped == {"not UTF-8": 1}
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "bytes.parquet")
    with pytest.raises(
        ac.InvalidInput, match=r"bytes\.parquet, row 0: no text in field 'text'.*nor can any other of its 2"
    ):
        tokens(tmp_path / "bytes.parquet")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ac.InvalidInput, match=r"no\.parquet: not a Parquet file"):
        tokens(tmp_path / "no.parquet")


# Tokens that are there already


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_token_lists_in_a_field(tokens, tmp_path: Path, name: str):
    rows: list[Any] = [[1, 2, 3], [], [4], None]
    if name.endswith("jsonl"):
        rows += [[1.5], "x", [True], [1, [2]], [1 << 70]]
        (tmp_path / name).write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in rows))
    else:
        table = pyarrow.table({"ids": pyarrow.array([*rows, [5, None]], pyarrow.list_(pyarrow.int64()))})
        pyarrow.parquet.write_table(table, tmp_path / name)
    made = tokens(tmp_path / name, tokens_field="ids")
    assert made.documents() == [[1, 2, 3], [4]]
    assert made.rows() == [(0, 0), (0, 2)]
    assert made.record.skipped == {"empty": 1, "field missing": 1, "wrong type": 5 if name.endswith("jsonl") else 1}


def test_token_files(tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 7)
    ids = np.random.default_rng(0).integers(0, 30, 500)
    cut = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == 3) + 1) if len(part)]
    for dtype in ("uint16", "int32", "int64", ">u4"):
        np.save(tmp_path / "a.npy", ids.astype(dtype))
        assert tokens(tmp_path / "a.npy").documents() == [ids.tolist()]
        made = tokens(tmp_path / "a.npy", split_at_eos=True, eos_id=3)
        assert made.documents() == cut
        assert made.rows() == [(0, i) for i in range(len(cut))]
    np.save(tmp_path / "b.npy", ids.reshape(20, 25))
    made = tokens(tmp_path / "b.npy")
    assert (made.documents(), made.rows()) == (ids.reshape(20, 25).tolist(), [(0, i) for i in range(20)])
    for dtype in ("uint16", "uint32"):
        ids.astype(f"<{dtype[0]}{int(dtype[4:]) // 8}").tofile(tmp_path / "a.bin")
        assert tokens(tmp_path / "a.bin", token_dtype=dtype).documents() == [ids.tolist()]
        assert tokens(tmp_path / "a.bin", token_dtype=dtype, split_at_eos=True, eos_id=3).documents() == cut


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(3), "holds float64 of shape"),
        (np.zeros((2, 2, 2), int), "one dimension, or a sequence a row"),
        (np.asfortranarray(np.zeros((3, 2), int)), "by columns"),
        (np.array([{}]), "holds object"),
        (np.zeros(0, int), "no token ids; the corpus has no tokens"),
        (
            np.array([1, -1]),
            "token id -1 is beyond the model's vocabulary of 257; the corpus was tokenised for another",
        ),
        (np.array([1, 257]), r"a\.npy, row 0: token id 257 is beyond"),
    ],
)
def test_npy_files_that_are_no_tokens(tokens, tmp_path: Path, array: np.ndarray, says: str):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ac.InvalidInput, match=says):
        tokens(tmp_path / "a.npy")


def test_token_files_that_end_too_soon(tokens, tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(100))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-3])
    with pytest.raises(ac.InvalidInput, match="ends within its token ids"):
        tokens(tmp_path / "a.npy")
    (tmp_path / "a.bin").write_bytes(b"abc")
    with pytest.raises(ac.InvalidInput, match="not uint16"):
        tokens(tmp_path / "a.bin")
    (tmp_path / "b.npy").write_bytes(b"no")
    with pytest.raises(ac.InvalidInput, match=r"b\.npy: not a \.npy file"):
        tokens(tmp_path / "b.npy")


def test_a_model_without_a_tokenizer_is_built_from_tokens(model: Path, tmp_path: Path):
    import shutil

    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).unlink(missing_ok=True)
    np.save(tmp_path / "a.npy", np.arange(200).reshape(10, 20))
    (tmp_path / "a.txt").write_text("text")
    spec = ac.Spec(model=str(bare), corpus=(str(tmp_path / "a.npy"),))
    assert ac.build(spec, tmp_path / "ds").state == "built"
    ds = ac.open(tmp_path / "ds")
    assert ds.tokens["token_id"].tolist() == list(range(200))
    assert not ds.tokens["special"].any()
    assert ds.provenance.spec.tokenizer is None
    assert ac.verify(tmp_path / "ds", full=True).ok
    for change, says in (
        ({"corpus": str(tmp_path / "a.txt")}, r"no tokenizer .* or give a corpus that is tokenised already"),
        ({"bos": "always"}, "--bos always needs .*the model has no tokenizer; give its id with --bos-id"),
        ({"pack": True}, "--pack puts .*give its id with --eos-id"),
        ({"split_at_eos": True}, "--split-at-eos needs"),
    ):
        with pytest.raises(ac.InvalidInput, match=says):
            resolve(ac.Spec(**(spec.model_dump() | change)))
    packed = ac.Spec(**(spec.model_dump() | {"bos": "always", "bos_id": 1, "pack": True, "eos_id": 0, "context": 8}))
    ac.build(packed, tmp_path / "packed")
    ds = ac.open(tmp_path / "packed")
    assert set(ds.tokens["token_id"][ds.sequence_start[:-1]].tolist()) == {1}


# Conversations

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def test_conversations_go_through_the_chat_template(tokens, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    talk = [{"role": "user", "content": "Hi 🦜"}, {"role": "assistant", "content": "Hello", "tool": None}]
    odd = [[], [{"role": "x", "content": "?"}], "text", [{"role": "user"}], [{"role": "user", "content": "\ud800"}]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in [talk, *odd, talk[:1]]))
    with pytest.raises(ac.InvalidInput, match="--messages-field needs a chat template, and the tokenizer has none"):
        tokens(tmp_path / "a.jsonl", messages_field="messages")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    made = tokens(tmp_path / "a.jsonl", messages_field="messages")
    expected = [tokenizer.apply_chat_template(t, tokenize=True, return_dict=False) for t in (talk, talk[:1])]
    assert made.documents() == expected
    assert made.record.skipped == {
        "empty": 1, "refused by the chat template": 1, "wrong type": 2, "half a surrogate pair": 1,
    }  # fmt: skip
    talks = pyarrow.array([[{"role": "user", "content": "Hi"}]])
    columns_of = pyarrow.array([{"role": ["user"], "content": ["Hi"]}])
    for name, array in (("rows", talks), ("columns", columns_of)):
        pyarrow.parquet.write_table(pyarrow.table({"m": array}), tmp_path / f"{name}.parquet")
        made = tokens(tmp_path / f"{name}.parquet", messages_field="m")
        assert made.documents() == [tokenizer("<user>Hi\n")["input_ids"]]


# Datasets of Hugging Face


def test_folders_that_save_to_disk_wrote(tokens, tokenizer, tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    rows = {"text": [f"row {i}" for i in range(7)], "ids": [[i, i + 1] for i in range(7)]}
    train = datasets.Dataset.from_dict(rows)
    train.filter(lambda row: row["ids"][0] % 2 == 0).save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": train, "test": train.select([5])}).save_to_disk(tmp_path / "many")
    made = tokens(tmp_path / "one")
    assert made.documents() == [tokenizer(f"row {i}")["input_ids"] for i in (0, 2, 4, 6)]
    assert made.rows() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(tokens(tmp_path / "many").documents()) == 7
    assert tokens(tmp_path / "many", split="test", tokens_field="ids").documents() == [[5, 6]]
    for folder, split, says in (
        ("many", "dev", r"no split 'dev' \(there is: train, test\); choose with --split"),
        ("one", "test", "one dataset without splits"),
    ):
        with pytest.raises(ac.InvalidInput, match=says):
            tokens(tmp_path / folder, split=split)
    with pytest.raises(ac.InvalidInput, match=r"row 0: no text in field 'body' \(there is: text, ids\)"):
        tokens(tmp_path / "one", text_field="body")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ac.InvalidInput, match=r"data-00001-of-00002\.arrow: no such file"):
        tokens(tmp_path / "one")


SHA = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*.parquet}, {split: test, path: data/test-*.parquet}]
- config_name: other
  data_files: other.jsonl
---
"""


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A hub cache as huggingface_hub leaves it: blobs, and a snapshot of links to them."""
    repo = tmp_path / "hf/hub/datasets--org--name"
    contents = {
        "README.md": CARD.encode(),
        "other.jsonl": b'{"text": "another"}\n',
    }
    path = write(tmp_path / "part.parquet", ["tested"])
    contents["data/test-00000-of-00001.parquet"] = path.read_bytes()
    for number in range(2):
        path = write(tmp_path / "part.parquet", [f"row {number} {i}" for i in range(3)])
        contents[f"data/train-0000{number}-of-00002.parquet"] = path.read_bytes()
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs/main").write_text(SHA)
    for number, (name, data) in enumerate(contents.items()):
        (repo / f"blobs/{number:040x}").write_bytes(data)
        link = repo / "snapshots" / SHA / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repo / f"blobs/{number:040x}")
    return tmp_path / "hf"


def offline(hub: Path, *args: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    import os

    quiet = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **quiet, **(environment or {})}
    command = [sys.executable, "-m", "actcache", "build", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_hub_dataset_without_a_network(hub_cache: Path, model: Path, tmp_path: Path):
    url = "hf://datasets/org/name"
    done = offline(hub_cache, tmp_path / "ds", "--model", model, "--corpus", url)
    assert done.returncode == 0, done.stderr
    ds = ac.open(tmp_path / "ds")
    texts = [f"row {number} {i}" for number in range(2) for i in range(3)]
    assert ds.n_tokens == sum(map(len, texts))
    assert ds.tokens["document_row"].tolist() == [[0, i] for i in range(6)]
    assert (ds.provenance.labels.corpus_revision, ds.provenance.labels.corpus) == (SHA, (url,))
    identity = ds.provenance.spec.corpus
    assert (identity.kind, identity.revision, identity.split) == ("hub dataset", SHA, "train")
    again = offline(hub_cache, tmp_path / "ds", "--model", model, "--corpus", f"{url}@{SHA}")
    assert "already sealed" in again.stdout
    other = offline(hub_cache, tmp_path / "ds", "--model", model, "--corpus", url, "--split", "test")
    assert "corpus.split: train here, test asked for" in other.stderr


def test_what_a_hub_dataset_has_not(hub_cache: Path, model: Path, tmp_path: Path):
    url = "hf://datasets/org/name"
    for number, (args, says) in enumerate((
        ((url, "--dataset-config", "nope"), "--dataset-config and --split"),
        ((url, "--split", "dev"), "--dataset-config and --split"),
        (("hf://datasets/org/absent",), "the hub cannot be reached"),
        ((f"{url}@v2",), "the hub cannot be reached"),
        ((f"{url}/data/train.parquet",), "not of the form hf://datasets/ORG/NAME"),
    )):  # fmt: skip
        done = offline(hub_cache, tmp_path / str(number), "--model", model, "--corpus", *args)
        assert done.returncode in (1, 2)
        assert says in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("actcache: error: ")
    (hub_cache / f"hub/datasets--org--name/snapshots/{SHA}/data/train-00001-of-00002.parquet").unlink()
    done = offline(hub_cache, tmp_path / "half", "--model", model, "--corpus", url)
    assert "has 1 of the 2 parts" in done.stderr


# Bad rows


def test_strict_stops_at_the_first_bad_row(tokens, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"body": 1}\nnonsense\n')
    made = tokens(tmp_path / "a.jsonl")
    assert made.record.skipped == {"field missing": 1, "not JSON": 1}
    says = r"a\.jsonl, line 2: no text in field 'text' \(there is: body\).*; without --strict such rows are skipped"
    with pytest.raises(ac.InvalidInput, match=says):
        tokens(tmp_path / "a.jsonl", strict=True)
    assert tokens(tmp_path / "a.jsonl", strict=True, max_tokens=2).record.skipped == {}


def test_strict_is_kept_when_the_tokens_are_there_already(model: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{}\n')
    spec = ac.Spec(model=str(model), corpus=(str(tmp_path / "a.jsonl"),))
    ac.build(spec, tmp_path / "ds", stage="tokenise")
    with pytest.raises(ac.InvalidInput, match="1 rows were skipped when these tokens were stored"):
        ac.build(ac.Spec(**(spec.model_dump() | {"strict": True})), tmp_path / "ds")
    assert ac.build(spec, tmp_path / "ds").state == "built"


def test_a_corpus_of_bad_rows_alone_names_the_first(tokens, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 3}\n' * 5)
    with pytest.raises(
        ac.InvalidInput, match=r"line 1: no text in field 'text' \(there is: body, id\).*other of its 5 rows"
    ):
        tokens(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(ac.InvalidInput, match="no tokens: there are no rows"):
        tokens(tmp_path / "b.jsonl")
    with pytest.raises(ac.InvalidInput, match="no tokens left: 4 documents are shorter than min_tokens"):
        tokens(write(tmp_path / "c.jsonl", ["a"] * 4), min_tokens=2)


# Which documents, in which order


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Three files of 40 documents, of 1 to 30 bytes; every fifth row is bad."""
    for name in "abc":
        rows = [{"text": f"{name}{i:02d}" * (1 + i % 10)} if i % 5 else {} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "[abc].jsonl")


def test_shuffle_and_sample_are_fixed_by_the_seed(tokens, numbered: str):
    whole, shuffled = tokens(numbered), tokens(numbered, shuffle=7)
    assert shuffled.rows() != whole.rows()
    assert sorted(shuffled.rows()) == whole.rows()
    by_row = dict(zip(whole.rows(), whole.documents(), strict=True))
    assert shuffled.documents() == [by_row[row] for row in shuffled.rows()]
    assert tokens(numbered, shuffle=7).record.content == shuffled.record.content
    assert tokens(numbered, shuffle=8).rows() != shuffled.rows()
    assert tokens(numbered, shuffle=7, max_documents=9).rows() == shuffled.rows()[:9]
    assert tokens(numbered, shuffle=7, sample=9).rows() == shuffled.rows()[:9]
    sample = tokens(numbered, sample=9)
    assert sample.rows() == sorted(tokens(numbered, shuffle=0).rows()[:9])
    assert tokens(numbered, sample=9, max_documents=4).rows() == sample.rows()[:4]
    assert tokens(numbered, sample=10_000).rows() == whole.rows()
    some = tokens(numbered, shuffle=7, max_tokens=50)
    assert some.arrays["token_id"].tolist() == shuffled.arrays["token_id"].tolist()[:50]
    for made in (whole, shuffled, sample):
        assert made.record.skipped == {"field missing": 24}


def test_limits_and_what_they_drop(tokens, numbered: str):
    whole = tokens(numbered)
    lengths = [len(ids) for ids in whole.documents()]
    kept = [i for i, n in enumerate(lengths) if 9 <= n <= 18]
    made = tokens(numbered, min_tokens=9, max_document_tokens=18)
    assert made.rows() == [whole.rows()[i] for i in kept]
    assert made.record.dropped == {
        "shorter than min_tokens": sum(n < 9 for n in lengths),
        "longer than max_document_tokens": sum(n > 18 for n in lengths),
    }
    assert "documents were dropped, shorter than min_tokens" in made.notes[0]
    assert tokens(numbered, max_documents=3).rows() == whole.rows()[:3]
    assert tokens(numbered, max_documents=3).record.skipped == {"field missing": 1}
    assert tokens(numbered, max_tokens=40, long="truncate", context=4).record.n_documents == 10
    assert tokens(numbered, min_tokens=9, sample=5, shuffle=1).record.n_documents == 5


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_portions_change_nothing(tokens, numbered: str, data):
    fields: dict[str, Any] = data.draw(
        st.fixed_dictionaries({}, optional={
            "shuffle": st.integers(0, 3), "sample": st.integers(1, 60), "max_documents": st.integers(1, 60),
            "max_tokens": st.integers(1, 900), "min_tokens": st.integers(1, 12), "max_document_tokens": st.integers(12, 30),
            "pack": st.booleans(), "bos": st.sampled_from(["tokenizer", "always", "never"]), "context": st.integers(2, 32),
        })
    )  # fmt: skip
    expected = tokens(numbered, **fields).record
    with pytest.MonkeyPatch.context() as patch:
        from actcache.jobs import selection

        patch.setattr(collecting, "ITEMS_AT_ONCE", data.draw(st.integers(1, 9)))
        patch.setattr(selection, "LEAST_KEPT", data.draw(st.integers(1, 5)))
        assert tokens(numbered, **fields).record == expected


def test_what_is_counted_does_not_depend_on_who_was_faster(tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from actcache.jobs import selection

    path = write(
        tmp_path / "a.jsonl", ["<|endoftext|>" if i % 3 else f"text {i}" for i in range(300)]
    )  # BOS alone is no text
    fields: dict[str, Any] = {"bos": "always", "sample": 7, "shuffle": 2}
    whole = tokens(path, bos="always")
    assert whole.record.skipped == {"empty": 200}
    expected = tokens(path, **fields).record
    assert 0 < expected.skipped["empty"] < 100
    monkeypatch.setattr(selection, "LEAST_KEPT", 1)
    for size in (1, 3, 50):
        monkeypatch.setattr(collecting, "ITEMS_AT_ONCE", size)
        assert tokens(path, **fields).record == expected
    with pytest.raises(ac.InvalidInput, match="documents have no tokens; build without --strict"):
        tokens(path, strict=True, **fields)


# Sequences


def test_packing_joins_with_eos_and_loses_nothing(tokens, tokenizer, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ["hello", "x<|endoftext|>", "you there"])
    end = tokenizer.eos_token_id
    parts = [tokenizer(text)["input_ids"] for text in ("hello", "x", "you there")]
    made = tokens(path, pack=True, context=4)
    stream = [token for part in parts for token in (*part, end)]
    assert made.arrays["token_id"].tolist() == stream  # a document that ends with EOS gets no second one
    assert made.documents() == [[*part, end] for part in parts]
    assert [len(sequence) for sequence in made.sequences()] == [4, 4, 4, 4, 2]
    always = tokens(path, pack=True, context=4, bos="always", bos_id=5)
    assert [sequence[0] for sequence in always.sequences()] == [5] * 6
    assert [token for sequence in always.sequences() for token in sequence[1:]] == stream
    assert always.documents() == made.documents()


def test_bos_before_every_sequence_or_as_the_tokenizer_adds_it(tokens, tokenizer, model: Path, tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    path = write(tmp_path / "a.jsonl", ["abcdef", "<|endoftext|>gh"])
    plain = [tokenizer(text)["input_ids"] for text in ("abcdef", "gh")]
    always = tokens(path, bos="always", context=4)
    assert always.sequences() == [[0, *plain[0][:3]], [0, *plain[0][3:]], [0, *plain[1]]]
    assert always.arrays["document_position"].tolist() == [-1, 0, 1, 2, -1, 3, 4, 5, -1, 0, 1]
    assert always.arrays["document"].tolist() == [0] * 8 + [1] * 3
    assert tokens(path, context=4).sequences() == [plain[0][:4], plain[0][4:], [0, *plain[1]]]
    before = tokenizer.backend_tokenizer.post_processor
    try:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        added = tokens(path, context=4)
        assert added.sequences() == [[0, *plain[0][:3]], plain[0][3:], [0, 0, *plain[1]]]
        assert added.arrays["document_position"].tolist()[:7] == list(range(7))
        assert tokens(path, context=4, bos="never").sequences() == [plain[0][:4], plain[0][4:], [0, *plain[1]]]
        assert tokens(path, context=4, bos="always").sequences() == always.sequences()
    finally:
        tokenizer.backend_tokenizer.post_processor = before


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"long": "stride"}, "--long stride and --stride N go together"),
        ({"stride": 4}, "--long stride and --stride N go together"),
        ({"long": "stride", "stride": 40}, "--stride 40 is more than the 32 tokens of a window"),
        ({"long": "stride", "stride": 32, "bos": "always"}, "more than the 31 tokens"),
        ({"pack": True, "long": "truncate"}, "--long truncate has no meaning"),
        ({"bos": "always", "context": 1}, "no room for a document in --context 1"),
        ({"bos_id": 257}, "--bos-id 257 is beyond the model's vocabulary of 257"),
        ({"eos_id": 300}, "--eos-id 300"),
        ({"min_tokens": 9, "max_document_tokens": 8}, "no document would be left"),
        ({"tokens_field": "a", "messages_field": "b"}, "leave one out"),
        ({"tokens_field": "a"}, "--tokens-field has no meaning for text files"),
        ({"split": "train"}, "--split has no meaning for text files"),
        ({"dataset_config": "x"}, "--dataset-config has no meaning"),
        ({"token_dtype": "uint32"}, "--token-dtype has no meaning"),
        ({"split_at_eos": True}, "--split-at-eos has no meaning"),
        ({"shuffle": -1}, "shuffle"),
        ({"sample": 0}, "sample"),
        ({"bos": "maybe"}, "bos"),
    ],
)
def test_options_that_do_not_go_together(model: Path, tmp_path: Path, fields: dict[str, Any], says: str):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ac.InvalidInput, match=says) as caught:
        resolve(ac.Spec(model=str(model), corpus=(str(tmp_path / "a.txt"),), **fields))
    assert "\n" not in str(caught.value)


def test_everything_that_decides_the_tokens_is_in_the_key(model: Path, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ["some", "texts"])
    spec = ac.Spec(model=str(model), corpus=(str(path),))
    plan = resolve(spec).plan
    for change in (
        {"text_field": "n"}, {"tokens_field": "n"}, {"messages_field": "n"}, {"long": "truncate"}, {"pack": True},
        {"long": "stride", "stride": 3}, {"bos": "always"}, {"bos": "never"}, {"bos_id": 3}, {"eos_id": 3}, {"min_tokens": 1},
        {"max_document_tokens": 9}, {"shuffle": 0}, {"sample": 5}, {"max_documents": 5},
    ):  # fmt: skip
        other = resolve(ac.Spec(**(spec.model_dump() | change))).plan
        assert other.key != plan.key, change
        assert other.tokens_key != plan.tokens_key, change
    assert resolve(ac.Spec(**(spec.model_dump() | {"strict": True}))).plan.key == plan.key


def test_the_options_of_the_command_line_are_the_fields_of_a_spec(model: Path, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ["some text that is long", "x", "another one of them"], "body")
    args = [
        "--text-field",
        "body",
        "--min-tokens",
        "2",
        "--max-document-tokens",
        "99",
        "--shuffle",
        "3",
        "--sample",
        "2",
    ]
    args += [
        "--long",
        "stride",
        "--stride",
        "5",
        "--context",
        "8",
        "--bos",
        "always",
        "--max-documents",
        "2",
        "--strict",
    ]
    command = ["build", str(tmp_path / "cli"), "--model", str(model), "--corpus", str(path), *args]
    assert CliRunner().invoke(main, command).exit_code == 0
    (tmp_path / "spec.toml").write_text(
        f'model = "{model}"\ncorpus = "a.jsonl"\ntext_field = "body"\nmin_tokens = 2\nmax_document_tokens = 99\nshuffle = 3\n'
        'sample = 2\nlong = "stride"\nstride = 5\ncontext = 8\nbos = "always"\nmax_documents = 2\nstrict = true\n'
    )
    again = CliRunner().invoke(main, ["build", str(tmp_path / "spec.toml"), str(tmp_path / "cli")])
    assert "already sealed" in again.output, again.output
    assert ac.open(tmp_path / "cli").n_documents == 2


def test_a_bad_row_stops_nobody_but_is_told(model: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": 1}\n')
    command = ["build", str(tmp_path / "ds"), "--model", str(model), "--corpus", str(tmp_path / "a.jsonl")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0
    assert "note: 1 rows were skipped (1 wrong type); the first:" in done.stderr
    assert json.loads((tmp_path / "ds/.actcache/tokens.json").read_text())["skipped"] == {"wrong type": 1}
    strict = CliRunner().invoke(main, [*command[:1], str(tmp_path / "other"), *command[2:], "--strict"])
    assert (strict.exit_code, strict.stderr.count("actcache: error:")) == (2, 1)
    assert isinstance(
        next(iter(open_corpus(ac.Spec(model="m", corpus=(str(tmp_path / "a.jsonl"),))).documents())), Document
    )
    assert BadRow.__doc__


def test_a_hub_dataset_is_streamed_at_its_commit(model: Path, tmp_path: Path):
    from tests.hub_server import serving

    files = {"README.md": CARD.encode(), "other.jsonl": b'{"text": "another"}\n'}
    for name, texts in (("train-00000-of-00002", ["a b", "c"]), ("train-00001-of-00002", ["d"]), ("test-0", ["e"])):
        files[f"data/{name}.parquet"] = write(tmp_path / "part.parquet", texts).read_bytes()
    url = "hf://datasets/org/name"
    with serving(SHA, files) as (endpoint, requests):
        there = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        done = offline(tmp_path / "hf", tmp_path / "ds", "--model", model, "--corpus", url, environment=there)
        assert done.returncode == 0, done.stderr
        assert f"GET /datasets/org/name/resolve/{SHA}/data/train-00001-of-00002.parquet" in requests
        assert not [request for request in requests if "test-0.parquet" in request]
        for args, says in (
            (f"{url}@v2", f"{url}@v2: "),
            ("hf://datasets/org/other", "hf://datasets/org/other: "),
        ):
            bad = offline(tmp_path / "hf", tmp_path / "no", "--model", model, "--corpus", args, environment=there)
            assert (bad.returncode != 0, bad.stderr.count("\n")) == (True, 1), bad.stderr
            assert says in bad.stderr
    ds = ac.open(tmp_path / "ds")
    assert ds.tokens["document_row"].tolist() == [[0, 0], [0, 1], [0, 2]]
    assert ds.n_tokens == 5
    assert ds.provenance.labels.corpus_revision == SHA


@pytest.mark.parametrize(
    "fields",
    [
        {"long": "stride", "stride": 10, "bos": "always"},
        {"pack": True, "bos": "always"},
        {"shuffle": 4, "long": "truncate"},
    ],
)
def test_whatever_the_sequences_the_dataset_is_whole(model: Path, corpus: str, tmp_path: Path, fields: dict[str, Any]):
    spec = ac.Spec(model=str(model), corpus=(corpus,), block_tokens=160, batch_size=4, outputs=("loss",), **fields)
    first = ac.build(spec, tmp_path / "ds")
    assert ac.build(spec, tmp_path / "again").manifest == first.manifest
    assert ac.verify(tmp_path / "ds", full=True).ok
    ds = ac.open(tmp_path / "ds")
    last = np.zeros(ds.n_tokens, bool)
    last[ds.sequence_start[1:] - 1] = True
    assert np.array_equal(np.isnan(ds["loss"].compute()), last)
    assert np.diff(ds.sequence_start).max() == 32
    assert ds.provenance.replay.status == "replayed"
