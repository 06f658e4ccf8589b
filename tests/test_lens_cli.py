"""`actcache lens …` as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import actcache as ac
from actcache.clients.cli import main
from tests.test_transfer import random_lens


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def lens(built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ac.lens.Lens:
    """What the file `some.lens` in this folder holds."""
    found = random_lens(ac.lens.states(ac.open(built)))
    ac.lens.save(found, tmp_path / "some.lens")
    monkeypatch.chdir(tmp_path)
    return found


def test_transfer_as_text_json_csv_and_pictures(built: str, lens: ac.lens.Lens, tmp_path: Path):
    want = ac.lens.transfer(lens, ac.open(built), max_tokens=200)
    base = ("lens", "transfer", built, "--lens", "some.lens", "--max-tokens", 200)
    done = call(*base, "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.svg")
    assert done.exit_code == 0, done.output
    assert done.output == f"{want}\n{tmp_path / 'a.csv'}\n{tmp_path / 'a.svg'}\n"
    assert "penalty (bits per byte)" in (tmp_path / "a.svg").read_text()
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["measure"] == "penalty"]
    np.testing.assert_allclose([float(row["value"]) for row in rows], want["penalty"].ravel())
    assert (rows[1]["lens"], rows[1]["layer"]) == ("embed", "0")
    shown = call(*base, "--json", "--plot", tmp_path / "b.png")
    assert json.loads(shown.stdout) == json.loads(json.dumps(want.to_dict()))
    assert shown.stderr == f"{tmp_path / 'b.png'}\n"
    assert call("lens", "transfer", built).exit_code == 2


def test_show_is_the_table_of_the_logit_lens_unless_another_is_given(built: str, lens: ac.lens.Lens, tmp_path: Path):
    ds = ac.open(built)
    base = ("lens", "show", built, "--sequence", 1, "--start", 2, "--stop", 6)
    plain = call(*base)
    assert plain.exit_code == 0, plain.output
    assert plain.output == f"{ac.lens.predictions(None, ds, 1, 2, 6)}\n"
    other = call(*base, "--lens", "some.lens", "--top", 3)
    assert other.output == f"{ac.lens.predictions(lens, ds, 1, 2, 6).table(top=3)}\n"
    shown = call(
        *base, "--top", 3, "--json", "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.png", "--colour", "kl"
    )
    assert np.shape(json.loads(shown.stdout)["top_id"]) == (4, 4, 3)
    assert shown.stderr == f"{tmp_path / 'a.csv'}\n{tmp_path / 'a.png'}\n"
    assert len((tmp_path / "a.csv").read_text().splitlines()) > 4 * 4 * 3


def test_logit_writes_csv_and_draws_too(built: str, tmp_path: Path):
    done = call("lens", "logit", built, "--max-tokens", 100, "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.svg")
    assert done.exit_code == 0, done.output
    assert done.output.endswith(f"{tmp_path / 'a.csv'}\n{tmp_path / 'a.svg'}\n")
    assert (tmp_path / "a.csv").read_text().startswith("measure,unit,layer,value,low,high\nloss,nats,embed,")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plot", "a.pdf"), ".png and .svg"),
        (("--plot", "nowhere/a.png"), "does not exist"),
        (("--csv", "nowhere/a.csv"), "does not exist"),
        (("--sequence", "9999"), "no sequence 9999"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(built: str, options: tuple[str, str], said: str):
    done = call("lens", "show", built, "--sequence", 0, *options)
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.splitlines()) == 1
