"""How alike layers are, and how many dimensions they use: against numpy on all states at once, and on planted truths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group

import actcache as ac
from actcache.clients.geometry.influence import Z
from actcache.clients.geometry.products import PairSums
from actcache.clients.geometry.spectrum import _measured
from tests.planted import plant
from tests.test_capturable import example

D, SEQUENCES, POSITIONS = 12, 40, 25


def flat(ds: ac.Dataset) -> np.ndarray:
    """All states, (layer, token, d) float64."""
    return np.stack([ds[site].compute() for site in ds.sites]).astype(np.float64)


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """By the kernels, as in the paper's equations 1 and 3."""
    k, m = (kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean() for kernel in (x @ x.T, y @ y.T))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, by kernels without their diagonals."""
    n, one = len(x), np.ones(len(x))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    totals = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k * m).sum() + totals - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def correlated(seed: int = 0) -> np.ndarray:
    """Layers that share some of their variance, documents that differ: (4, sequence, position, d)."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(SEQUENCES, POSITIONS, D)) + generator.normal(size=(SEQUENCES, 1, D))
    scale = np.geomspace(3, 0.3, D)
    return np.stack([shared * scale + 0.6 * layer * generator.normal(size=shared.shape) + layer for layer in range(4)])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ac.Dataset:
    return plant(correlated(), tmp_path_factory.mktemp("planted") / "ds")


def test_similarities_are_those_of_all_states_at_once(planted: ac.Dataset):
    states = flat(planted)
    found = ac.geometry.similarity(planted)
    covariance = [np.cov(x.T) for x in states]
    for i in range(4):
        for j in range(i, 4):
            x, y = states[i], states[j]
            np.testing.assert_allclose(found["cka"][i, j], cka(x, y), rtol=1e-5)
            unbiased = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
            np.testing.assert_allclose(found["cka_unbiased"][i, j], unbiased, rtol=1e-5)
            cosine = (covariance[i] * covariance[j]).sum()
            cosine /= np.linalg.norm(covariance[i]) * np.linalg.norm(covariance[j])
            np.testing.assert_allclose(found["covariance_cosine"][i, j], cosine, rtol=1e-5)
    for name in found:
        np.testing.assert_array_equal(found[name], found[name].T)
    assert found.unit("cka") == "1"
    assert found.axes("cka") == ("layer", "other_layer")
    assert found.facts["passes"] == 2
    some = ac.geometry.similarity(planted.where(position__lt=10), sites=["layer1", "layer3"], without=[0, 5])
    chosen = np.delete(states[:, planted.tokens["position"] < 10], [0, 5], axis=2)
    np.testing.assert_allclose(some["cka"][0, 1], cka(chosen[1], chosen[3]), rtol=1e-5)
    few = ac.geometry.similarity(planted, max_tokens=30)
    np.testing.assert_allclose(few["cka"][1, 2], cka(states[1, :30], states[2, :30]), rtol=1e-5)


def test_little_memory_takes_more_passes_and_finds_the_same(planted: ac.Dataset):
    whole = ac.geometry.similarity(planted)
    for matrices, passes in ((3, 12), (9, 6)):
        found = ac.geometry.similarity(planted, memory=matrices * 2 * 8 * D * D)
        assert found.facts["passes"] == passes
        for name in whole:
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-6)
        np.testing.assert_allclose(found.interval("cka"), whole.interval("cka"), rtol=1e-5)
    wide = ac.geometry.spectrum(planted)
    narrow = ac.geometry.spectrum(planted, memory=1)
    assert (wide.facts["passes"], narrow.facts["passes"]) == (2, 8)
    np.testing.assert_allclose(narrow.interval("effective_rank"), wide.interval("effective_rank"), rtol=1e-9)


def test_a_rotated_layer_is_the_same_and_an_unrelated_one_is_not(tmp_path: Path):
    generator = np.random.default_rng(1)
    first = generator.normal(size=(30, 40, D)) * np.geomspace(2, 0.5, D)
    turned = 3 * first @ ortho_group.rvs(D, random_state=2) + 5
    other = generator.normal(size=first.shape) * np.geomspace(2, 0.5, D)
    found = ac.geometry.similarity(plant(np.stack([first, turned, other]), tmp_path / "ds"))
    assert found["cka"][0, 1] == pytest.approx(1, abs=1e-6)
    assert found["cka_unbiased"][0, 1] == pytest.approx(1, abs=1e-6)
    assert found["covariance_cosine"][0, 2] > 0.95, "the same spectrum in the same basis"
    assert found["covariance_cosine"][0, 1] < 0.85
    null = found["cka_shuffled"][0, 2]
    assert 0.5 * null < found["cka"][0, 2] < 2 * null
    assert abs(found["cka_unbiased"][0, 2]) < null


def test_the_controls_are_what_chance_gives(tmp_path: Path):
    generator = np.random.default_rng(3)
    states = generator.normal(size=(2, 6, 5, 4)) * np.array([3, 1, 1, 0.3])
    found = ac.geometry.similarity(plant(states, tmp_path / "ds"))
    x, y = states.reshape(2, 30, 4)
    shuffled = [cka(x, generator.permutation(y)) for _ in range(3000)]
    error = np.std(shuffled) / np.sqrt(len(shuffled))
    assert abs(found["cka_shuffled"][0, 1] - np.mean(shuffled)) < 4 * error
    a, b = np.cov(x.T), np.cov(y.T)
    turns = ortho_group.rvs(4, size=5000, random_state=4)
    cosines = np.einsum("ij,nji->n", a, turns @ b @ turns.transpose(0, 2, 1)) / np.linalg.norm(a) / np.linalg.norm(b)
    error = cosines.std() / np.sqrt(len(cosines))
    assert abs(found["covariance_cosine_rotated"][0, 1] - cosines.mean()) < 4 * error


@pytest.mark.parametrize("rows", [7, 64, 8192])
def test_pairing_within_documents_is_what_chance_gives(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where pieces end within documents."""
    monkeypatch.setattr("actcache.clients.states.MOST_ROWS", rows)
    monkeypatch.setattr("actcache.clients.states.FEWEST_ROWS", 1)
    generator = np.random.default_rng(8)
    shared = generator.normal(size=(1, 9, 1, 4))
    states = generator.normal(size=(2, 9, 11, 4)) + shared + np.array([2, 0, 0, -1])
    ds = plant(states, tmp_path / "ds")
    found = ac.geometry.similarity(ds)["cka_shuffled_in_documents"][0, 1]
    x, y = states
    shuffled = [
        cka(x.reshape(-1, 4), np.concatenate([generator.permutation(document) for document in y])) for _ in range(3000)
    ]
    error = np.std(shuffled) / np.sqrt(len(shuffled))
    assert abs(found - np.mean(shuffled)) < 4 * error
    assert found > 5 * ac.geometry.similarity(ds)["cka_shuffled"][0, 1], "documents differ in both layers"
    one = ac.geometry.similarity(ds.document(4))
    np.testing.assert_allclose(one["cka_shuffled_in_documents"], one["cka_shuffled"], rtol=1e-5)
    alone = ac.geometry.similarity(ds.where(position=3))
    np.testing.assert_allclose(alone["cka_shuffled_in_documents"], alone["cka"], rtol=1e-5)


@given(st.integers(4, 30), st.integers(1, 5), st.integers(1, 5), st.floats(-30, 30), st.integers(0, 2**32 - 1))
def test_the_unbiased_estimate_needs_no_more_than_sums(n: int, d: int, k: int, shift: float, seed: int):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, d))
    y = generator.normal(size=(n, k)) + x[:, :1]
    sums = PairSums.empty(d, k)
    for part in np.array_split(np.arange(n), 3):
        sums.add((x + shift)[part].astype(np.float64), y[part])
    assert sums.hsic == pytest.approx(hsic(x, y), abs=1e-5 * (1 + shift**2))


def test_the_unbiased_estimate_is_unbiased_and_the_other_is_not():
    generator = np.random.default_rng(5)
    found = []
    for _ in range(400):
        x, y = generator.normal(size=(2, 20, 8))
        sums = PairSums.empty(8, 8)
        sums.add(x, y)
        found.append((sums.hsic, np.square(sums.centred).sum() / 19**2))
    unbiased, biased = np.array(found).T
    assert abs(unbiased.mean()) < 4 * unbiased.std() / 20
    assert biased.mean() > 20 * biased.std() / 20


def jackknife(numbers: list[np.ndarray]) -> np.ndarray:
    """The standard error by deleting one document at a time."""
    values = np.array(numbers)
    return np.sqrt((len(values) - 1) * values.var(axis=0))


def test_intervals_are_those_of_deleting_documents(planted: ac.Dataset):
    states = flat(planted).reshape(4, SEQUENCES, POSITIONS, D)
    rest = [np.delete(states, number, axis=1).reshape(4, -1, D) for number in range(SEQUENCES)]

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        a, b = np.cov(x.T), np.cov(y.T)
        return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)

    def fast_cka(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        return np.square(x.T @ y).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)

    found = ac.geometry.similarity(planted)
    for name, exact in (("cka", fast_cka), ("covariance_cosine", cosine)):
        low, high = found.interval(name)
        value = found[name]
        for i, j in ((0, 1), (1, 3), (2, 3)):
            error = jackknife([exact(x[i], x[j]) for x in rest]) / (value[i, j] * (1 - value[i, j]))
            logit = [np.log(end / (1 - end)) for end in (low[i, j], high[i, j])]
            np.testing.assert_allclose((logit[1] - logit[0]) / (2 * Z), error, rtol=0.2)
        assert np.all((low <= value + 1e-12) & (value <= high + 1e-12))
        assert np.array_equal(np.diag(low), np.diag(value)), "a layer is the same as itself, whatever the documents"
    measured = ac.geometry.spectrum(planted)
    firsts = 2 ** np.arange(4)
    of_rest = [[_measured(np.linalg.eigvalsh(np.cov(x.T))[::-1], firsts)[0] for x in each] for each in rest]
    error = jackknife(of_rest)
    for place, name in enumerate(("effective_rank", "effective_rank_of_variance", "participation_ratio", "variance")):
        low, high = measured.interval(name)
        np.testing.assert_allclose(np.log(high / low) / (2 * Z), error[:, place] / measured[name], rtol=0.2)
    low, high = measured.interval("variance_share")
    share = measured["variance_share"]
    width = (np.log(high / (1 - high)) - np.log(low / (1 - low))) / (2 * Z)
    np.testing.assert_allclose(width, error[:, 4:] / (share * (1 - share)), rtol=0.2)


def test_the_spectrum_is_that_of_the_centred_states(planted: ac.Dataset):
    found = ac.geometry.spectrum(planted)
    for layer, states in enumerate(flat(planted)):
        singular = np.linalg.svd(states - states.mean(axis=0), compute_uv=False)
        for name, weights in (("effective_rank", singular), ("effective_rank_of_variance", singular**2)):
            share = weights / weights.sum()
            np.testing.assert_allclose(found[name][layer], np.exp(-(share * np.log(share)).sum()), rtol=1e-6)
        variance = singular**2 / len(states)
        np.testing.assert_allclose(found["variance"][layer], variance.sum(), rtol=1e-6)
        np.testing.assert_allclose(
            found["participation_ratio"][layer], variance.sum() ** 2 / (variance**2).sum(), rtol=1e-6
        )
        np.testing.assert_allclose(
            found["variance_share"][layer], (np.cumsum(variance) / variance.sum())[[0, 1, 3, 7]], rtol=1e-6
        )
    some = ac.geometry.spectrum(planted, without=range(2, D), intervals=False)
    np.testing.assert_allclose(some["variance"], flat(planted)[:, :, :2].var(axis=1).sum(axis=1), rtol=1e-6)
    assert np.all(some["effective_rank"] <= 2)
    with pytest.raises(ac.NotFound, match="no interval"):
        some.interval("effective_rank")


def test_a_planted_rank_is_found_and_hidden_by_one_large_dimension(tmp_path: Path):
    generator = np.random.default_rng(6)
    latent, _ = np.linalg.qr(generator.normal(size=(800, 5)) - 0.0)
    latent -= latent.mean(axis=0)
    latent = np.linalg.qr(latent)[0] * np.sqrt(800)
    inside = np.linalg.qr(generator.normal(size=(D - 1, 5)))[0].T
    states = np.zeros((2, 800, D))
    states[:, :, 1:] = latent @ inside
    states[1, :, 0] = 300 * generator.normal(size=800)
    ds = plant(states.reshape(2, 20, 40, D), tmp_path / "ds")
    found = ac.geometry.spectrum(ds)
    for name in ("effective_rank", "effective_rank_of_variance", "participation_ratio"):
        assert found[name][0] == pytest.approx(5, rel=1e-4), name
        assert found[name][1] < 1.2
        np.testing.assert_allclose(ac.geometry.spectrum(ds, without=[0])[name], 5, rtol=1e-4)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9))
def test_slopes_by_eigenvalues_are_finite_differences(eigenvalues: list[float]):
    values = np.sort(eigenvalues)[::-1]
    firsts = np.array([1, 2])
    found, slopes = _measured(values, firsts)
    for place in range(len(values)):
        step = np.zeros(len(values))
        step[place] = 1e-6 * values[place]
        change = (_measured(values + step, firsts)[0] - _measured(values - step, firsts)[0]) / (2 * step[place])
        np.testing.assert_allclose(slopes[place], change, rtol=1e-3, atol=1e-4 * np.abs(found).max() / values[place])


def test_sites_of_different_widths(tmp_path: Path):
    cnn = example("cnn")
    sites = {"conv1": "layers.0", "conv2": "layers.1", "conv3": "layers.2"}
    module = ac.Capturable(name="cnn", module=cnn.CNN(), inputs=cnn.gratings(60)[0], sites=sites)
    ac.build(ac.Spec(model=module, sites="all"), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    found = ac.geometry.similarity(ds)
    assert found.labels["layer"] == ("conv1", "conv2", "conv3")
    assert "covariance_cosine" not in found
    x, y = (ds[site].compute().astype(np.float64) for site in ("conv1", "conv3"))
    np.testing.assert_allclose(found["cka"][0, 2], cka(x, y), rtol=1e-4)
    assert ac.geometry.spectrum(ds)["variance_share"].shape == (3, 7)
    with pytest.raises(ac.InvalidInput, match="differ in width"):
        ac.geometry.norms(ds, updates=True)


def test_a_constant_layer_has_no_similarity_and_no_spectrum(tmp_path: Path):
    states = np.random.default_rng(7).normal(size=(2, 5, 6, 3))
    states[1] = 2
    ds = plant(states, tmp_path / "ds")
    found = ac.geometry.similarity(ds)
    assert np.isnan(found["cka"][0, 1])
    assert np.isnan(found["cka"][1, 1])
    assert found["cka"][0, 0] == pytest.approx(1)
    spectrum = ac.geometry.spectrum(ds)
    assert np.isnan(spectrum["effective_rank"][1])
    assert spectrum["effective_rank"][0] > 1


def test_what_cannot_be_measured_is_refused(planted: ac.Dataset, built: str):
    for arguments, said in (
        ({"sites": []}, "each once"),
        ({"sites": ["layer0", "layer0"]}, "each once"),
        ({"max_tokens": 3}, "at least 4"),
        ({"max_tokens": 0}, "at least 1"),
        ({"without": [D]}, "from 0 to 11"),
        ({"without": [-1]}, "from 0 to 11"),
        ({"without": range(D)}, "no dimension is left"),
        ({"quantised": "int3"}, "int8"),
    ):
        with pytest.raises(ac.InvalidInput, match=said):
            ac.geometry.similarity(planted, **arguments)
    with pytest.raises(ac.NotFound, match="layer9"):
        ac.geometry.similarity(planted, sites=["layer9"])
    with pytest.raises(ac.NotFound, match="int8"):
        ac.geometry.spectrum(planted, quantised="int8", sites=["layer0"])
    with pytest.raises(ac.InvalidInput, match="twice"):
        ac.geometry.similarity(planted.at([1, 1, 2, 3, 4]))
    chosen = ac.lens.states(ac.open(built))
    assert ac.geometry.similarity(chosen).facts["tokens"] == len(chosen)
    with pytest.raises(ac.InvalidInput, match="chosen already"):
        ac.geometry.similarity(chosen, max_tokens=5)
