"""Names, counts and units in pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import actcache as ac
from actcache.clients.results import Measure


def test_massive_is_drawn_where_there_is_none(built: str, tmp_path: Path):
    found = ac.geometry.massive(ac.open(built))
    assert found.facts["massive"] == 0
    assert ac.figures.draw(found, tmp_path / "a.svg").exists()
    assert "largest (dimension)" in (tmp_path / "a.svg").read_text()


def test_the_name_of_an_axis_is_on_several_lines_where_it_is_long(tmp_path: Path):
    unit = "squared units of the states that were read"
    results = ac.lens.Results({"tokens": Measure(np.ones(2), unit)}, {"layer": ["0", "1"]})
    text = ac.figures.draw(results, tmp_path / "a.svg").read_text()
    assert "of the</tspan>" in text or ">tokens (squared units of the states<" in text
    assert "\\n" not in text


def test_long_names_stand_upright_and_counts_are_whole(tmp_path: Path):
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(6)]
    results = ac.lens.Results(
        {"count": Measure(np.arange(36).reshape(6, 6), "tokens", ("layer", "other_layer"))},
        {"layer": names, "other_layer": names},
    )
    text = ac.figures.draw(results, tmp_path / "a.svg").read_text()
    assert all(text.count(f">{name}</text>") == 2 for name in names)
    assert text.count("rotate(-90") >= len(names)
    assert ">29</text>" in text
    assert "other layer" in text
