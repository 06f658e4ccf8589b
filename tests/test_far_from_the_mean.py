"""Selections whose mean is thousands of standard deviations from the stored one, as that of first tokens is in a GPT-2."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import actcache as ac
from actcache.clients.covariance import Products
from actcache.clients.lens.ridge import grams
from tests.planted import plant

WIDTH, POSITIONS, SEQUENCES = 8, 32, 40
HALF = SEQUENCES // 2 * POSITIONS
OFFSET = 3000


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[ac.Dataset, np.ndarray]:
    """A dataset whose first half has an offset in some dimensions, and the states of that half, (layer, token, d) float64."""
    generator = np.random.default_rng(0)
    first = generator.normal(size=(SEQUENCES, POSITIONS, WIDTH))
    second = first @ np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))[0] + generator.normal(size=first.shape)
    states = np.stack([first, second])
    states[:, : SEQUENCES // 2, :, :3] += OFFSET
    states = states.astype(np.float32)
    ds = plant(states, tmp_path_factory.mktemp("far") / "ds")
    return ds, states[:, : SEQUENCES // 2].reshape(2, HALF, WIDTH).astype(np.float64)


def test_similarity(half: tuple[ac.Dataset, np.ndarray]):
    ds, states = half
    x, y = states - states.mean(axis=1, keepdims=True)
    cka = np.square(x.T @ y).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    found = ac.geometry.similarity(ds.at(np.arange(HALF)))
    assert found["cka"][0, 1] == pytest.approx(cka, abs=1e-5)
    assert found["cka_unbiased"][0, 1] == pytest.approx(cka, abs=0.05)
    np.testing.assert_allclose(np.diag(found["cka_unbiased"]), 1)
    low, high = found.interval("cka")
    assert low[0, 1] < cka < high[0, 1]


def test_what_a_lens_is_fitted_from(half: tuple[ac.Dataset, np.ndarray]):
    ds, states = half
    target = np.zeros(ds.n_tokens, int)
    read = ac.lens.states(ds.at(np.arange(HALF)), sites=ds.sites, head=ac.lens.Head([], {}), targets=target)
    (gram,) = grams(read)
    np.testing.assert_allclose(gram.covariance, np.cov(states[0].T, bias=True), atol=1e-4)
    np.testing.assert_allclose(gram.mean, states[0].mean(axis=0), atol=1e-3)


def test_a_probe(half: tuple[ac.Dataset, np.ndarray]):
    ds, states = half
    wanted = states[0, :, 0] + states[0, :, 5] - OFFSET
    labels = np.full(ds.n_tokens, np.nan)
    labels[:HALF] = wanted + 0.1 * np.random.default_rng(1).normal(size=HALF)
    found = ac.probe.fit(ds.at(np.arange(HALF)), labels, control=False).results["r2"]
    plain = [LinearRegression().fit(each, labels[:HALF]).score(each, labels[:HALF]) for each in states]
    np.testing.assert_allclose(found, plain, atol=0.1)
    assert found[0] > 0.98


def test_sums_of_products_are_those_of_float64():
    generator = np.random.default_rng(2)
    x, y = (generator.normal(size=(500, width)) for width in (4, 5))
    x[:, 1] += 1e4
    x[:, 2] = 7  # never changes
    y[:, 0] -= 1e4
    x, y = x.astype(np.float32), y.astype(np.float32)
    for first, second in ((x, y), (x, x), (x[:, :1], y), (x, y[:, 1:])):
        sums = Products.empty(first.shape[1], second.shape[1])
        for part in (slice(0, 1), slice(1, 1), slice(1, 300), slice(300, 500)):
            rows = first[part]
            sums.add(rows, rows if first is second else second[part])
        exact = [each.astype(np.float64) - each.mean(axis=0, dtype=np.float64) for each in (first, second)]
        np.testing.assert_allclose(sums.covariance, exact[0].T @ exact[1] / 500, atol=2e-6)
