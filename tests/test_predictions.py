"""What each layer predicts at each position: against torch, and shown safely."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from transformers import AutoModelForCausalLM

import actcache as ac
from actcache.cache.head import Head
from actcache.clients.lens.predictions import _best
from actcache.clients.summary import visible
from tests.test_transfer import random_lens


def longest(ds: ac.Dataset) -> int:
    return int(np.diff(ds.sequence_start).argmax())


def test_they_are_the_models_own_at_every_position_the_last_one_too(built: str, model: Path):
    ds = ac.open(built)
    number = longest(ds)
    found = ac.lens.predictions(None, ds, sequence=number, top=5)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    selection = ds.sequence(number)
    with torch.inference_mode():
        h = torch.from_numpy(selection.resid.compute())
        logs = torch.log_softmax(plain.lm_head(plain.transformer.ln_f(h)).double(), dim=-1)
    ids = torch.from_numpy(selection.tokens["token_id"].astype(np.int64))
    best = logs.topk(5)
    np.testing.assert_allclose(found.probability, best.values.exp(), rtol=1e-4)
    assert (found.top_id == best.indices.numpy()).mean() > 0.99
    np.testing.assert_allclose(found.entropy, -(logs.exp() * logs).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found.kl, (logs[-1].exp() * (logs[-1] - logs)).sum(-1), rtol=1e-3, atol=1e-5)
    own = logs[:, torch.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found.loss[:, :-1], -own, rtol=1e-4)
    assert np.isnan(found.loss[:, -1]).all()
    rank = 1 + (logs[:, :-1] > own[..., None]).sum(-1).numpy()
    assert (found.rank[:, :-1] == rank).mean() > 0.99
    assert np.all(found.rank[:, -1] == 0)
    assert found.next_id[-1] == -1
    assert [found.string(index) for index in found.token_id] == selection.strings
    assert found.layers == ("embed", "0", "1", "2")


def test_start_stop_layers_and_top_choose_parts_of_the_whole_table(built: str):
    ds = ac.open(built)
    number = longest(ds)
    lens = random_lens(ac.lens.states(ds))
    whole = ac.lens.predictions(lens, ds, number, top=3)
    part = ac.lens.predictions(lens, ds, number, start=-6, stop=-1, top=1, layers=[-1, 1])
    assert part.layers == (whole.layers[1], whole.layers[3])
    np.testing.assert_array_equal(part.top_id, whole.top_id[[1, 3], -6:-1, :1])
    np.testing.assert_allclose(part.loss, whole.loss[[1, 3], -6:-1], rtol=1e-5)
    np.testing.assert_array_equal(part.rank, whole.rank[[1, 3], -6:-1])
    everything = ac.lens.predictions(lens, ds, number, stop=1, top=10**6)
    np.testing.assert_allclose(everything.probability.sum(-1), 1, rtol=1e-4)
    last = ac.lens.predictions(lens, ds, number, start=-1)
    np.testing.assert_array_equal(last.top_id[:, 0, :3], whole.top_id[:, -1])


def test_selections_and_states_are_read_too(built: str):
    ds = ac.open(built)
    found = ac.lens.predictions(None, ds.where(position=3))
    assert set(found.position.tolist()) == {3}
    np.testing.assert_array_equal(found.token, np.flatnonzero(ds.tokens["position"] == 3))
    loss = ds["loss"].compute()[found.token]
    np.testing.assert_allclose(found.loss[-1], loss, rtol=1e-4)
    number = longest(ds)
    read = ac.lens.states(ds)
    some = ac.lens.predictions(None, read, sequence=number, start=2, stop=5)
    np.testing.assert_array_equal(some.token, ds.sequence_start[number] + np.arange(2, 5))
    ahead = ac.lens.states(ds, offset=2)
    later = ac.lens.predictions(random_lens(ahead), ds, sequence=number)
    assert len(later.token) == np.diff(ds.sequence_start)[number] - 2
    assert later.next_id[-1] == -1
    np.testing.assert_array_equal(later.next_id[:-1], ds.sequence(number).tokens["token_id"][3:])


def test_what_is_predicted_by_another_head_is_no_token(built: str):
    ds = ac.open(built)
    targets = (ds.tokens["token_id"] % 2).astype(int)
    head = Head([{"op": "linear", "weight": "w"}], {"w": np.eye(2, ds.d_model, dtype=np.float32)})
    found = ac.lens.predictions(None, ac.lens.states(ds, head=head, targets=targets), sequence=1, stop=4)
    assert found.text is None
    assert found.top_id.max() <= 1
    assert "text" not in found.to_dict()
    assert str(found.token_id[0]) in str(found)


def test_what_cannot_be_shown_is_refused_in_one_line(built: str):
    ds = ac.open(built)
    for arguments, said in (
        ({}, "say which sequence"),
        ({"sequence": 10**6}, "no sequence 1000000"),
        ({"sequence": 0, "start": 4, "stop": 4}, "0 tokens are chosen"),
        ({"sequence": 0, "top": 0}, "top=0"),
        ({"sequence": 0, "layers": [9]}, "0 to 3"),
        ({"sequence": 0, "layers": []}, "0 to 3"),
    ):
        with pytest.raises(ac.InvalidInput, match=said) as error:
            ac.lens.predictions(None, ds, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ac.InvalidInput, match="whole dataset"):
        ac.lens.predictions(None, ds.where(position=1), sequence=0)


def test_json_and_csv_have_every_number(built: str, tmp_path: Path):
    ds = ac.open(built)
    found = ac.lens.predictions(None, ds, longest(ds), start=-3, top=2)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["next_id"][-1] is None
    assert back["loss"][0][-1] is None
    assert back["rank"][0][-1] is None
    np.testing.assert_allclose(back["probability"], found.probability)
    assert back["top_text"][1][0][1] == found.string(found.top_id[1, 0, 1])
    with found.to_csv(tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found.top_id.size
    row = rows[3 * 2 * 1 + 2 * 2 + 1]  # layer 0, the last position, its second prediction
    assert (row["layer"], row["place"], row["next_id"], row["loss_nats"]) == ("0", "2", "", "")
    assert float(row["probability"]) == pytest.approx(float(found.probability[1, 2, 1]))
    assert row["predicted_text"] == found.string(found.top_id[1, 2, 1])


def test_ties_go_to_the_smaller_id():
    values = np.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    assert _best(values, 4).tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]]
    assert _best(values, 2)[0].tolist() == [1, 2]


@pytest.fixture(scope="module")
def table(built: str) -> ac.lens.Predictions:
    return ac.lens.predictions(None, ac.open(built), sequence=1, stop=9, top=2)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=9), st.integers(44, 150), st.integers(1, 3))
def test_whatever_the_tokens_are_the_table_stands_in_columns(
    table: ac.lens.Predictions, strings: list[str], width: int, top: int
):
    ids = np.unique(np.concatenate([table.token_id, table.next_id, table.top_id.ravel()]))
    odd = replace(
        table, text={int(index): strings[number % len(strings)] for number, index in enumerate(ids)}, facts={}
    )
    shown = odd.table(width, top)
    for block in shown.split("\n\n")[1:]:
        lines = block.split("\n")
        assert all(line.isprintable() for line in lines)
        assert max(map(cell_len, lines)) <= width
        assert len(lines) == 3 + 4 * min(top, 2)
        assert [line.split()[0] for line in lines[:2]] == ["position", "token"]
        assert lines[2].startswith("2 ")
        assert lines[-2 - min(top, 2) + 1].startswith("embed")


def test_the_table_is_as_wide_as_the_terminal(table: ac.lens.Predictions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = str(table).split("\n")
    assert 40 < max(map(cell_len, lines[3:])) <= 60
    right = int(table.right.sum())
    assert sum(line.count("* ") + line.endswith("*") for line in lines[3:]) >= right


@given(st.text(max_size=30))
def test_what_is_visible_is_printable_and_stays_in_its_cell(text: str):
    shown = visible(text)
    assert shown.isprintable()
    assert " " not in shown
    assert bool(shown) == bool(text)


def test_spaces_and_marks_are_seen():
    assert visible(" the\n\t") == "␣the↵⇥"
    assert visible("\n" + " " * 8) == "↵␣×8"
    assert visible("\u0301") == "◌\u0301"
    assert visible("\x1b[31m\u202e") == "\ufffd[31m\ufffd"
