"""Files of lenses and probes that strangers made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache as ac
from actcache.clients import tensor_file
from tests.test_lens_cli import call


@pytest.fixture(scope="module")
def ridge(built: str) -> ac.lens.Lens:
    return ac.lens.fit(ac.open(built), "ridge", max_tokens=1200)


@pytest.mark.parametrize(
    "change",
    [
        {"facts": {"held_out": 3}},
        {"facts": {"held_out": {"tokens": 3}}},
        {"offset": 10**30},
        {"weight": np.nan},
    ],
)
def test_lenses_of_strangers_are_refused_in_one_line(ridge: ac.lens.Lens, tmp_path: Path, change: dict[str, Any]):
    path = ac.lens.save(ridge, tmp_path / "a.lens")
    arrays, facts = tensor_file.read(path, "lens")
    arrays["weight"] = arrays["weight"] + np.float32(change.pop("weight", 0))
    tensor_file.write(path, arrays, {**facts, **change})
    with pytest.raises(ac.InvalidInput, match="no lens"):
        ac.lens.load(path)


def test_a_lens_of_another_width_is_refused_and_its_names_reach_no_terminal(
    built: str, ridge: ac.lens.Lens, tmp_path: Path
):

    narrow = replace(ridge, weight=ridge.weight[:, :3, :3], bias=ridge.bias[:, :3])
    with pytest.raises(ac.InvalidInput, match="3 dimensions"):
        ac.lens.evaluate(narrow, ac.open(built), 100)
    odd = replace(ridge, sites=tuple(f"\x1b[31m{site}" for site in ridge.sites))
    done = call("lens", "eval", built, "--lens", ac.lens.save(odd, tmp_path / "a.lens"))
    assert done.exit_code == 2
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"method": ["ridge"]},
        {"labels": ["x"]},
        {"facts": []},
        {"classes": {"dtype": "i", "values": [10**40, 1]}},
        {"results": {"labels": {"layer": ["a"]}}},
        {"results": {"facts": 3}},
        {"results": {"measures": {}}},
    ],
)
def test_probes_of_strangers_are_refused_in_one_line(built: str, tmp_path: Path, change: dict[str, Any]):
    ds = ac.open(built)
    path = ac.probe.fit(ds, ds.tokens["position"] % 2, max_tokens=1200, control=False).save(tmp_path / "a.probe")
    arrays, facts = tensor_file.read(path, "probe")
    if "results" in change:
        change = {"results": {**facts["results"], **change["results"]}}
    tensor_file.write(path, arrays, {**facts, **change})
    with pytest.raises(ac.InvalidInput, match="a damaged probe"):
        ac.probe.Probe.load(path)
