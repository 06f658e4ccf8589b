"""Norms by layer, massive activations, and the histogram behind both; and the command line of the geometry."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import actcache as ac
from actcache.clients.geometry.histogram import Magnitudes
from tests.planted import plant
from tests.test_cli import call

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.integers(1, 80), elements=FINITE), st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]))
def test_quantiles_are_exact_but_for_the_bins(values: np.ndarray, share: float):
    counts = Magnitudes(7)
    for part in np.array_split(values, 3):
        counts.add(part)
    exact = float(np.quantile(np.abs(values).astype(np.float64), share, method="inverted_cdf"))
    assert counts.quantile(share) == pytest.approx(exact, rel=2**-7, abs=2e-40)
    assert counts.counts.sum() == len(values)


def growing(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    first = generator.normal(size=(30, 20, 8))
    second = first + 0.5 * generator.normal(size=first.shape)
    return np.stack([first, second, -second, 4 * second + 1])


def test_norms_are_those_of_the_states(tmp_path: Path):
    ds = plant(growing(), tmp_path / "ds")
    found = ac.geometry.norms(ds, updates=True)
    states = np.stack([ds[site].compute() for site in ds.sites]).astype(np.float64)
    size = np.linalg.norm(states, axis=2)
    wanted = np.percentile(size, (1, 5, 25, 50, 75, 95, 99), axis=1, method="inverted_cdf").T
    np.testing.assert_allclose(found["norm"], wanted, rtol=2**-10)
    np.testing.assert_allclose(found["growth"][1:], np.exp(np.log(size[1:] / size[:-1]).mean(axis=1)), rtol=1e-5)
    update = states[1:] - states[:-1]
    dot = np.einsum("lnd,lnd->ln", states[:-1], states[1:])
    np.testing.assert_allclose(found["cosine"][1:], (dot / size[:-1] / size[1:]).mean(axis=1), rtol=1e-5)
    length = np.linalg.norm(update, axis=2)
    np.testing.assert_allclose(found["update_size"][1:], (length / size[1:]).mean(axis=1), rtol=1e-5)
    along = np.einsum("lnd,lnd->ln", update, states[1:]) / size[1:] ** 2
    np.testing.assert_allclose(found["update_share"][1:], along.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(along, 1 - dot / size[1:] ** 2, rtol=1e-6, err_msg="the rest is what was there")
    lying = np.einsum("lnd,lnd->ln", update, states[:-1]) / length / size[:-1]
    np.testing.assert_allclose(found["update_cosine"][1:], lying.mean(axis=1), rtol=1e-4, atol=1e-6)
    assert found["cosine"][2] == pytest.approx(-1, abs=1e-5)
    assert found["update_size"][2] == pytest.approx(2, rel=1e-5)
    assert np.isnan(found["growth"][0])
    low, high = found.interval("median")
    assert np.all((low < found["median"]) & (found["median"] < high))


def test_the_interval_of_the_median_is_that_of_resampled_documents(tmp_path: Path):
    generator = np.random.default_rng(2)
    states = generator.normal(size=(1, 80, 15, 6)) * np.exp(0.5 * generator.normal(size=(1, 80, 1, 1)))
    found = ac.geometry.norms(plant(states, tmp_path / "ds"))
    size = np.linalg.norm(states[0], axis=2)
    drawn = [np.median(size[generator.integers(80, size=80)]) for _ in range(2000)]
    low, high = found.interval("median")
    want = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(high[0] - low[0], want[1] - want[0], rtol=0.2)
    np.testing.assert_allclose([low[0], high[0]], want, rtol=0.05)


def test_norms_read_no_activation(tmp_path: Path):
    url = tmp_path / "ds"
    whole = ac.geometry.norms(plant(growing(), url))
    for number in range(4):
        shutil.rmtree(url / f"layer{number}/c")
    ds = ac.open(url)
    np.testing.assert_array_equal(ac.geometry.norms(ds)["norm"], whole["norm"])
    with pytest.raises(ac.Corrupt):
        ac.geometry.norms(ds, updates=True)


def test_tokens_whose_state_is_zero_have_no_growth_and_no_cosine(tmp_path: Path):
    states = growing()
    states[0, 3, 5] = 0
    ds = plant(states, tmp_path / "ds")
    found = ac.geometry.norms(ds, updates=True)
    others = np.delete(states.reshape(4, -1, 8), 3 * 20 + 5, axis=1)
    size = np.linalg.norm(others, axis=2)
    np.testing.assert_allclose(found["growth"][1], np.exp(np.log(size[1] / size[0]).mean()), rtol=1e-5)
    cosine = np.einsum("nd,nd->n", others[0], others[1]) / size[0] / size[1]
    np.testing.assert_allclose(found["cosine"][1], cosine.mean(), rtol=1e-5)


def test_planted_massive_activations_are_found_where_they_are(tmp_path: Path):
    generator = np.random.default_rng(3)
    states = 0.2 * generator.normal(size=(5, 12, 30, 16))
    states[1:4, :, 0, 7] = -900 - 10 * np.arange(12)
    states[2, 4:6, 17, 3] = 400.0
    states[1, 0, 9, 2] = 90.0  # more than 100 times the median, below 100
    found = ac.geometry.massive(plant(states, tmp_path / "ds"))
    assert found.labels["dimension"] == ["7", "3"]
    np.testing.assert_array_equal(found["count"], [[0, 0], [12, 0], [12, 2], [12, 0], [0, 0]])
    np.testing.assert_array_equal(found["first_layer"], [1, 2])
    np.testing.assert_array_equal(found["last_layer"], [3, 2])
    np.testing.assert_array_equal(found["tokens"], [0, 12, 14, 12, 0])
    np.testing.assert_allclose(found["value"][1:4, 0], -955, rtol=1e-6)
    assert np.isnan(found["value"][0, 0])
    squares = np.square(states[2, :, 0])
    np.testing.assert_allclose(found["norm_share"][2, 0], (squares[:, 7] / squares.sum(axis=1)).mean(), rtol=1e-5)
    assert found.labels["position"] == ["0", "17"]
    np.testing.assert_array_equal(found["at_position"], [[12, 0], [0, 2]])
    np.testing.assert_array_equal(found["read_position"], [12, 12])
    assert "at_token" not in found, "images have no token ids"
    assert found.facts["massive"] == 38
    np.testing.assert_allclose(found["median"], np.median(np.abs(states), axis=(1, 2, 3)), rtol=2**-7)
    np.testing.assert_allclose(found["largest"], np.abs(states).max(axis=(1, 2, 3)), rtol=1e-6)
    assert found["largest_dimension"][2] == 7
    lower = ac.geometry.massive(ac.open(tmp_path / "ds"), absolute=50, ratio=200)
    assert lower["count"][1, lower.labels["dimension"].index("2")] == 1


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_gaussian_stream_has_none(scale: float, tmp_path: Path):
    """However large its numbers are."""
    states = scale * np.random.default_rng(4).normal(size=(3, 10, 30, 16))
    found = ac.geometry.massive(plant(states, tmp_path / "ds"))
    assert found.facts["massive"] == 0
    assert found["count"].shape == (3, 0)
    assert np.all(found["tokens"] == 0)
    assert np.all(found["largest_ratio"] < 10)
    assert "largest_ratio" in repr(found)
    assert found.to_csv(tmp_path / "x.csv").exists()
    json.dumps(found.to_dict())


def test_a_median_that_falls_on_the_way_costs_a_second_pass(tmp_path: Path):
    generator = np.random.default_rng(5)
    states = 0.1 * generator.normal(size=(1, 50, 1000, 4))
    states[:, :9] *= 100
    states[0, 3, 50, 2] = 300.0  # far below 200 times what the median is there
    found = ac.geometry.massive(plant(states, tmp_path / "ds"), ratio=200)
    assert found.facts["passes"] == 2
    assert found.facts["massive"] == 1
    assert found["value"][0, 0] == pytest.approx(300)
    assert found["read_position"][0] == 50


def test_tokens_are_told_by_their_text(built: str):
    ds = ac.open(built)
    found = ac.geometry.massive(ds, absolute=1e-3, ratio=3.0)
    states = np.abs(np.stack([ds[site].compute() for site in ds.residual_sites]))
    ids, positions = ds.tokens["token_id"], ds.tokens["position"]
    assert found.facts["massive"] > 0
    dimension = int(found.labels["dimension"][0])
    threshold = 3 * found["median"]
    above = states[:, :, dimension] > threshold[:, None]
    np.testing.assert_array_equal(found["count"][:, 0], above.sum(axis=1))
    somewhere = above.any(axis=0)
    for place, name in enumerate(found.labels["token"]):
        number = int(name.split()[0])
        assert found["at_token"][0, place] == (somewhere & (ids == number)).sum()
        assert found["read_token"][place] == (ids == number).sum()
    for place, name in enumerate(found.labels["position"]):
        assert found["at_position"][0, place] == (somewhere & (positions == int(name))).sum()


def test_thresholds_that_make_no_sense(built: str, monkeypatch: pytest.MonkeyPatch):
    ds = ac.open(built)
    for arguments in ({"absolute": 0}, {"ratio": -1}, {"ratio": float("nan")}):
        with pytest.raises(ac.InvalidInput, match="above 0"):
            ac.geometry.massive(ds, **arguments)
    monkeypatch.setattr("actcache.clients.geometry.candidates.MOST", 100)
    with pytest.raises(ac.InvalidInput, match="raise them"):
        ac.geometry.massive(ds, absolute=1e-9, ratio=1e-9)


def test_the_command_line(built: str, tmp_path: Path):
    shown = call("geometry", "norms", built, "--updates", "--csv", tmp_path / "n.csv")
    assert shown.exit_code == 0, shown.output
    assert "update_share" in shown.output
    with (tmp_path / "n.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    median = [row for row in rows if row["measure"] == "median"]
    assert [row["layer"] for row in median] == ["embed", "0", "1", "2"]
    assert float(median[0]["low"]) <= float(median[0]["value"]) <= float(median[0]["high"])
    found = json.loads(call("geometry", "similarity", built, "--json", "--max-tokens", 300, "--without", "0,1").stdout)
    assert found["tokens"] == 300
    assert found["without"] == [0, 1]
    assert np.shape(found["measures"]["cka"]["value"]) == (4, 4)
    spectrum = json.loads(call("geometry", "spectrum", built, "--json", "--no-intervals").stdout)
    assert spectrum["passes"] == 1
    massive = call("geometry", "massive", built, "--sites", "blocks.0.hook_resid_pre,blocks.2.hook_resid_post")
    assert "massive 0" in massive.output
    bad = call("geometry", "similarity", built, "--without", "a")
    assert bad.exit_code == 2
    assert "numbers separated by commas" in bad.output
    bad = call("geometry", "norms", built, "--csv", tmp_path / "absent/n.csv")
    assert bad.exit_code == 2
    assert "make it first" in bad.output


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parent.parent
    monkeypatch.chdir(tmp_path)
    sources = tuple(str(Path(sysconfig.get_path("stdlib")) / f"{name}.py") for name in ("abc", "bisect", "glob"))
    ac.build(ac.Spec(model=str(root / "examples/tiny-gpt"), corpus=sources), "demo.zarr")
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/geometry.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert (tmp_path / "similarity.csv").exists()
    assert np.all(np.diag(names["found"]["cka"]) > 0.999)  # type: ignore[index]
