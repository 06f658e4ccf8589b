"""Labels from text, and the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.clients.cli import main
from actcache.clients.probe.texts import _most_common, documents

TEXTS = ("def f(x):\n    return x\n", "naïve ☃ 日本語 🎉🎉 end\n", "x = 'é' * 3\n", "pass\n" * 30, "y", "# ∑\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ac.Dataset:
    """The bundled model, whose tokens are parts of characters where these are not ASCII, over some texts."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    model = str(Path(__file__).parent.parent / "examples/tiny-gpt")
    ac.build(ac.Spec(model=model, corpus=(str(folder / "*.txt"),), context=16), folder / "ds")
    return ac.open(folder / "ds")


def test_documents_are_their_texts_and_tokens_are_where_they_stand(written: ac.Dataset):
    found = list(documents(written))
    assert [document.text for document in found] == list(TEXTS)
    assert found[0].low == 0
    assert found[-1].high == written.n_tokens
    for document in found:
        assert document.spans.shape == (document.high - document.low, 2)
        ids = written.tokens["token_id"][document.low : document.high]
        for (start, end), alone in zip(document.spans, written.tokenizer.strings(ids), strict=True):
            assert alone == document.text[start:end] or "\ufffd" in alone


def test_a_function_of_a_token(written: ac.Dataset):
    labels = ac.probe.by_token(written, str.isspace)
    strings = written.tokenizer.strings(written.tokens["token_id"])
    assert labels.dtype == bool
    assert labels.tolist() == [text.isspace() for text in strings]
    kinds = ac.probe.by_token(written.where(position__gt=3), lambda text: None if text.isspace() else text[:1])
    assert kinds.tolist() == [None if text.isspace() else text[:1] for text in strings]


def test_a_label_of_a_document(written: ac.Dataset):
    lengths = ac.probe.by_document(written, len)
    owner = written.tokens["document"]
    assert lengths.tolist() == [len(TEXTS[number]) for number in owner]
    names = [chr(97 + number) for number in range(len(TEXTS))]
    assert ac.probe.by_document(written, names).tolist() == [names[number] for number in owner]
    assert ac.probe.by_document(written, np.zeros((len(TEXTS), 2))).shape == (written.n_tokens, 2)
    with pytest.raises(ac.InvalidInput, match="6 documents"):
        ac.probe.by_document(written, np.zeros(5))


def test_spans_of_characters(written: ac.Dataset):
    """The tokens of one character have one label; a space before a word does not count."""
    labels = ac.probe.by_span(
        written,
        lambda text: [
            (at, at + 1, "letter" if c.isalpha() else "sign") for at, c in enumerate(text) if not c.isspace()
        ],
    )
    for document in documents(written):
        for (start, end), label in zip(document.spans, labels[document.low : document.high], strict=True):
            kinds = Counter("letter" if c.isalpha() else "sign" for c in document.text[start:end] if not c.isspace())
            assert label == (kinds.most_common(1)[0][0] if kinds else None)
    with pytest.raises(ac.InvalidInput, match=r"document 0: a span \[0, 999\)"):
        ac.probe.by_span(written, lambda text: [(0, 999, "x")])
    over = ac.probe.by_span(written, lambda text: [(0, len(text), 0), (0, min(3, len(text)), 1)])
    assert over[0] == 1
    assert set(over.tolist()) == {0, 1}


@given(st.data())
def test_the_most_common_is_the_most_common(data: st.DataObject):
    character = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=20)))
    edge = st.integers(0, len(character))
    spans = np.array(data.draw(st.lists(st.tuples(edge, edge).map(sorted), min_size=1, max_size=6)))
    want = []
    for low, high in spans.tolist():
        counted = Counter(number for number in character[low:high].tolist() if number >= 0)
        want.append(counted.most_common(1)[0][0] if counted else -1)  # the first that was met, of equals
    assert _most_common(character, spans).tolist() == want


def test_tokens_that_overlap_and_special_ones(tmp_path: Path, model: Path):
    """Where sequences overlap a token of a text is stored more than once; a token put before each sequence is none of the text."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("abcdefghij" * (number + 1) + "é")
    ac.build(
        ac.Spec(model=str(model), corpus=(str(tmp_path / "*.txt"),), context=8, long="stride", stride=5, bos="always"),
        tmp_path / "ds",
    )
    ds = ac.open(tmp_path / "ds")
    assert (ds.tokens["document_position"] == -1).any()
    assert [document.text for document in documents(ds)] == ["abcdefghij" * (number + 1) + "é" for number in range(6)]
    labels = ac.probe.by_span(ds, lambda text: [(at, at + 1, c) for at, c in enumerate(text)])
    strings = ds.tokenizer.strings(ds.tokens["token_id"])
    plain = (ds.tokens["document_position"] >= 0) & (ds.tokens["special"] == 0)
    want = ["é" if "\ufffd" in text else text for text in strings]
    assert [label for label, is_plain in zip(labels, plain, strict=True) if is_plain] == [
        text for text, is_plain in zip(want, plain, strict=True) if is_plain
    ]
    assert set(labels[~plain]) == {None}


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(each) for each in ("probe", "fit", *arguments)])
    return done.exit_code, done.output


def test_the_command(built: str, tmp_path: Path):
    ds = ac.open(built)
    code, said = call(built, "--labels", "token-regex:[aeiou]", "--held-out", 0.3, "--json")
    assert code == 0, said
    told = json.loads(said)
    want = ac.probe.fit(ds, ac.probe.by_token(ds, lambda text: any(c in "aeiou" for c in text)), held_out=0.3)
    assert told["measures"]["accuracy"]["value"] == want.results["accuracy"].tolist()
    assert told["sites"] == list(want.sites)
    code, said = call(
        *(built, "--labels", "field:position", "--task", "regression", "--csv", tmp_path / "x.csv"),
        *("--save", tmp_path / "x.safetensors", "--sites", "blocks.1.hook_resid_post", "--no-control"),
    )
    assert code == 0, said
    assert "r2" in said
    assert ac.probe.Probe.load(tmp_path / "x.safetensors").sites == ("blocks.1.hook_resid_post",)
    assert (tmp_path / "x.csv").read_text().startswith("measure,unit")
    np.save(tmp_path / "l.npy", np.arange(ds.n_documents) % 2)
    code, said = call(built, "--labels", tmp_path / "l.npy", "--method", "logistic", "--alpha", 10)
    assert code == 0, said
    assert "control document" in said


def test_labels_in_csv(built: str, tmp_path: Path):
    from actcache.clients.cli.label_sources import labels_of

    ds = ac.open(built)
    path = tmp_path / "l.csv"
    path.write_text("token,label\n0,3\n\n5,4\n6,\n")
    found = labels_of(ds, str(path))
    assert found.dtype == int
    assert {number: int(found[number]) for number in np.flatnonzero(found != -1)} == {0: 3, 5: 4}
    path.write_text("document,label\r\n1,yes\r\n0,\r\n")
    assert labels_of(ds, str(path)).tolist() == [None, "yes", *[None] * (ds.n_documents - 2)]
    path.write_text("token,label\n2,1\n0,0.5\n")
    assert labels_of(ds, str(path))[[0, 1, 2]].tolist()[::2] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"0,1\n", "first line"),
        (b"", "first line"),
        (b"token,label\n-1,1\n", "line 2"),
        (b"token,label\n1,1\n99999999,2\n", "line 3"),
        (b"token,label\n1,1,1\n", "line 2"),
        (b"token,label\n1,1\n1,2\n", "two labels"),
        (b"token,label\n\xff\xfe\n", "UTF-8"),
    ],
)
def test_csv_that_is_none(built: str, tmp_path: Path, content: bytes, said: str):
    (tmp_path / "l.csv").write_bytes(content)
    code, output = call(built, "--labels", tmp_path / "l.csv")
    assert code == 2
    assert said in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("token-regex:[", 2, "regular expression"),
        ("field:colour", 1, "no field"),
        ("labels.txt", 2, "field:NAME"),
        ("absent.npy", 1, "no such file"),
    ],
)
def test_sources_that_are_none(built: str, source: str, code: int, said: str):
    found, output = call(built, "--labels", source)
    assert found == code
    assert said in output
    assert output.count("\n") == 1


def test_a_pickle_is_not_loaded(built: str, tmp_path: Path):
    np.save(tmp_path / "l.npy", np.array([{"a": 1}]), allow_pickle=True)
    code, output = call(built, "--labels", tmp_path / "l.npy")
    assert code == 2
    assert "no array" in output


def test_the_classes_of_the_example(written: ac.Dataset):
    from examples.code_tokens_probe import classes, spans

    text = "for x in y:\n  é = 3.5 + 'é' # for\n"
    found = [(text[start:end], kind) for start, end, kind in spans(text)]
    assert found == [
        *[("for", "keyword"), ("x", "name"), ("in", "keyword"), ("y", "name"), (":", "operator")],
        *[("é", "name"), ("=", "operator"), ("3.5", "number"), ("+", "operator")],
        *[("'é'", "string"), ("# for", "comment")],
    ]
    assert [kind for _, _, kind in spans("x = (1,\n")] == ["name", "operator", "operator", "number", "operator"]
    labels = classes(written)
    first = [label for label, owner in zip(labels, written.tokens["document"], strict=True) if owner == 0]
    assert first[0] == "keyword"
    assert "whitespace" in first
