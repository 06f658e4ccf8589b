"""What functions of lenses, probes and geometry are given and give back: seeds, no dataset, None, results that are compared."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import actcache as ac
from tests.test_lens_cli import call


@pytest.fixture(scope="module")
def ridge(built: str) -> ac.lens.Lens:
    return ac.lens.fit(ac.open(built), "ridge", max_tokens=1200)


@pytest.mark.parametrize("seed", [-1])
def test_a_seed_is_not_below_0(built: str, ridge: ac.lens.Lens, seed: int):
    ds = ac.open(built)
    for measure in (
        lambda: ac.lens.fit(ds, "ridge", seed=seed),
        lambda: ac.probe.fit(ds, ds.tokens["position"] % 2, seed=seed),
        lambda: ac.lens.trajectories(ridge, ds, seed=seed),
        lambda: ac.lens.alignment(ridge, ds, seed=seed),
        lambda: ac.lens.error_prediction(ridge, ds, seed=seed),
    ):
        with pytest.raises(ac.InvalidInput, match="seed=-1"):
            measure()
    assert call("lens", "fit", built, "a.lens", "--seed", -1).exit_code == 2


def test_none_is_the_logit_lens_everywhere(built: str):
    read = ac.lens.states(ac.open(built), max_tokens=600)
    logit = ac.lens.identity(read)
    for measure in (ac.lens.evaluate, ac.lens.trajectories, ac.lens.alignment, ac.lens.error_prediction):
        found, want = measure(None, read), measure(logit, read)
        assert all(np.array_equal(found[name], want[name], equal_nan=True) for name in want)


def test_what_is_no_dataset_or_no_number_of_tokens_is_told(built: str, ridge: ac.lens.Lens):
    for measure in (
        ac.lens.logit,
        ac.lens.fit,
        ac.geometry.spectrum,
        lambda ds: ac.probe.fit(ds, [1]),
        lambda ds: ac.lens.transfer(None, ds),
    ):
        with pytest.raises(ac.InvalidInput, match=r"actcache\.open\(url\)"):
            measure("ds.zarr")  # type: ignore[arg-type]
    ds = ac.open(built)
    for measure in (
        lambda: ac.lens.logit(ds, -1),
        lambda: ac.lens.logit(ds.where(position__gt=1), -1),
        lambda: ac.lens.trajectories(ridge, ds, max_tokens=-1),
        lambda: ac.lens.transfer(None, ds, 0),
    ):
        with pytest.raises(ac.InvalidInput, match="give at least 1"):
            measure()


def test_states_are_one_short_line_and_results_compare_and_pickle(built: str):
    read = ac.lens.states(ac.open(built), max_tokens=300)
    assert len(repr(read)) < 120 + len(read.ds.url)
    first, second = ac.lens.logit(read), ac.lens.logit(read)
    assert first == first
    assert first != second
    assert len({first, second}) == 2
    assert pickle.loads(pickle.dumps(first))["loss"].tolist() == first["loss"].tolist()
    assert read != ac.lens.states(ac.open(built), max_tokens=300)
