"""Transfer penalties and comparisons of lenses: against brute force, and on states that were made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

import actcache as ac
from actcache.cache.head import Head
from actcache.clients.lens.translators import Lens, translator_count
from actcache.clients.states import States
from tests.planted import plant

LAYERS, SEQUENCES, POSITIONS, WIDTH, WORDS = 4, 24, 30, 6, 12


def random_lens(read: States, seed: int = 0, shared: bool = False, size: float = 0.1) -> Lens:
    generator = np.random.default_rng(seed)
    count = translator_count(read.n_layers, shared, read.offset)
    weight = size * generator.normal(size=(count, read.width, read.width)).astype(np.float32)
    bias = size * generator.normal(size=(count, read.width)).astype(np.float32)
    return Lens("tuned", read.sites, weight, bias, shared, read.offset, read.ds.model_key)


def brute_force(lens: Lens, ds: ac.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses (lens, layer, token) by float64 alone, of all tokens with a successor; their places, and their targets."""
    arrays = {name: array.astype(np.float64) for name, array in ds.head.arrays.items()}
    ids, sequence = ds.tokens["token_id"].astype(int), ds.tokens["sequence"]
    at = np.flatnonzero(sequence[:-1] == sequence[1:])
    h = ds.resid.compute().astype(np.float64)[:, at]
    count = len(h)
    losses = np.empty((count, count, len(at)))
    for i in range(count):
        number = lens.translator(i)
        for j in range(count):
            x = h[j] if number is None else h[j] + h[j] @ lens.weight[number].T.astype(float) + lens.bias[number]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            logits = (x * arrays["norm_gain"] + arrays["norm_bias"]) @ arrays["unembedding"].T
            losses[i, j] = logsumexp(logits, axis=1) - logits[np.arange(len(at)), ids[at + 1]]
    return losses, at, ids[at + 1]


@pytest.mark.parametrize("shared", [False, True])
def test_losses_and_penalties_are_those_of_brute_force(built: str, shared: bool):
    ds = ac.open(built)
    lens = random_lens(ac.lens.states(ds), shared=shared)
    losses, at, targets = brute_force(lens, ds)
    found = ac.lens.transfer(lens, ds, max_tokens=None)
    loss, own = losses.mean(-1), np.diagonal(losses.mean(-1))
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(found["penalty"], loss - own, atol=1e-4)
    assert np.all(np.diagonal(found["penalty"]) == 0)
    np.testing.assert_allclose(np.diagonal(found["loss"]), ac.lens.evaluate(lens, ds)["loss"], rtol=1e-4)

    vocabulary = json.loads(ds.tokenizer.files["tokenizer.json"])["model"]["vocab"]
    width = {index: len(token) for token, index in vocabulary.items()}  # a character of a byte-level token is a byte
    special = ds.tokens["special"][at + 1] != 0
    bytes_ = sum(width[index] for index in targets[~special])
    want = (losses - np.diagonal(losses).T[None]).sum(-1) / np.log(2) / bytes_
    np.testing.assert_allclose(found["penalty_bits_per_byte"], want, atol=1e-4)
    assert found.unit("penalty_bits_per_byte") == "bits per byte"
    assert found.axes("penalty") == ("lens", "layer")


def test_intervals_resample_documents_with_both_losses_of_a_penalty(built: str):
    ds = ac.open(built)
    lens = random_lens(ac.lens.states(ds))
    losses, at, _ = brute_force(lens, ds)
    document = np.unique(ds.tokens["document"][at], return_inverse=True)[1]
    sums = np.stack([losses[..., document == number].sum(-1) for number in range(document.max() + 1)])
    counts = np.bincount(document)
    own = np.arange(len(losses))
    difference = sums - sums[:, own, own][:, None, :]
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(sums), size=len(sums)) for _ in range(1000)]
    means = np.stack([difference[each].sum(0) / counts[each].sum() for each in drawn])
    low, high = ac.lens.transfer(lens, ds).interval("penalty")
    np.testing.assert_allclose(low, np.quantile(means, 0.025, axis=0), atol=1e-4)
    np.testing.assert_allclose(high, np.quantile(means, 0.975, axis=0), atol=1e-4)


def test_the_rows_of_a_shared_translator_are_equal_and_the_last_is_the_logit_lens(built: str):
    ds = ac.open(built)
    found = ac.lens.transfer(random_lens(ac.lens.states(ds), shared=True), ds)["loss"]
    assert np.all(found[:-1] == found[0])
    np.testing.assert_allclose(found[-1], ac.lens.logit(ds)["loss"], rtol=1e-5)
    ahead = ac.lens.states(ds, offset=2)
    lens = random_lens(ahead, shared=True)
    assert np.all(ac.lens.transfer(lens, ds)["loss"] == ac.lens.transfer(lens, ahead)["loss"][0])
    plain = ac.lens.transfer(None, ds)
    assert np.all(plain["penalty"] == 0)
    np.testing.assert_allclose(plain["loss"][0], found[-1], rtol=1e-6)


def test_what_a_lens_does_not_read_is_refused(built: str):
    ds = ac.open(built)
    lens = random_lens(ac.lens.states(ds))
    with pytest.raises(ac.SpecMismatch, match="another model"):
        ac.lens.transfer(replace(lens, model="0" * 64), ds)
    with pytest.raises(ac.InvalidInput, match="give sites="):
        ac.lens.transfer(replace(lens, sites=lens.sites[::-1]), ds)
    with pytest.raises(ac.InvalidInput, match="0 tokens ahead and the other 2"):
        ac.lens.compare(lens, random_lens(ac.lens.states(ds, offset=2)), ds)


def test_by_default_the_first_tokens_are_read_and_the_facts_say_so(built: str):
    ds = ac.open(built)
    lens = ac.lens.identity(ac.lens.states(ds))
    assert ac.lens.transfer(lens, ds).facts["max_tokens"] == 8192
    few = ac.lens.transfer(lens, ds, max_tokens=100)
    assert few.facts["max_tokens"] == 100
    assert few.facts["tokens"] < 100
    assert "max_tokens" not in ac.lens.transfer(lens, ac.lens.states(ds)).facts


class Planted:
    """A code c of which a head predicts words, which each layer holds in its own way: c @ mixing + noise."""

    def __init__(self, path: Path, mixings: list[np.ndarray], noise: float = 0.0) -> None:
        generator = np.random.default_rng(1)
        code = generator.normal(size=(SEQUENCES, POSITIONS, WIDTH))
        unembedding = 2 * generator.normal(size=(WORDS, WIDTH))
        self.head = Head([{"op": "linear", "weight": "w"}], {"w": unembedding.astype(np.float32)})
        chances = softmax(code.reshape(-1, WIDTH) @ unembedding.T, axis=1)
        self.targets = (chances.cumsum(1) > generator.random((len(chances), 1))).argmax(1)
        held = [code @ mixing + noise * generator.normal(size=code.shape) for mixing in mixings]
        self.code, self.held = code, held
        self.read = self._states(plant(np.stack(held), path))

    def _states(self, ds: ac.Dataset) -> States:
        return ac.lens.states(ds, sites=ds.sites, head=self.head, targets=self.targets)

    def lens(self, weight: list[np.ndarray]) -> Lens:
        read = self.read
        bias = np.zeros((len(weight), WIDTH), np.float32)
        return Lens("ridge", read.sites, np.stack(weight).astype(np.float32), bias, False, 0, read.ds.model_key)


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)))[0]


def test_layers_that_hold_one_code_have_no_penalties(tmp_path: Path):
    """Each layer with noise of its own, and a lens fitted on its own noise, as a lens of least squares is."""
    planted = Planted(tmp_path / "ds", [np.eye(WIDTH)] * LAYERS, noise=0.3)
    found = ac.lens.transfer(ac.lens.identity(planted.read), planted.read)
    assert np.all(found["penalty"] == 0)
    assert "penalty_bits_per_byte" not in found
    assert found.facts["bits_per_byte"].startswith("none: ")

    generator = np.random.default_rng(5)
    weight = []
    for _ in range(LAYERS - 1):
        seen = planted.code.reshape(-1, WIDTH)
        noisy = seen + 0.3 * generator.normal(size=seen.shape)
        weight.append(np.linalg.lstsq(noisy, seen, rcond=None)[0].T - np.eye(WIDTH))
    fitted = ac.lens.transfer(planted.lens(weight), planted.read)
    low, high = fitted.interval("penalty")
    inner = np.s_[: LAYERS - 1, : LAYERS - 1]
    assert np.abs(fitted["penalty"][inner]).max() < 0.02
    assert np.all((low[inner] <= 0.01) & (high[inner] >= -0.01))


def test_layers_that_are_rotated_are_read_by_their_own_lens_alone(tmp_path: Path):
    rotations = [*map(rotation, range(LAYERS - 1)), np.eye(WIDTH)]
    planted = Planted(tmp_path / "ds", rotations)
    lens = planted.lens([each - np.eye(WIDTH) for each in rotations[:-1]])  # h + h (Rᵀ - 1) = c R Rᵀ
    found = ac.lens.transfer(lens, planted.read)
    own = np.diagonal(found["loss"])
    np.testing.assert_allclose(own, own[0], rtol=1e-5)
    outside = ~np.eye(LAYERS, dtype=bool)
    low, _ = found.interval("penalty")
    assert found["penalty"][outside].min() > 1
    assert low[outside].min() > 0.5


def test_a_head_that_changes_nothing_leaves_the_states_as_they_are(tmp_path: Path):
    """Where the last state is the logits themselves, nothing may be computed in its place."""
    planted = Planted(tmp_path / "ds", [np.eye(WIDTH), rotation(1), rotation(2)])
    read = replace(planted.read, head=Head([], {}), target=planted.read.target % WIDTH)
    found = ac.lens.transfer(planted.lens([np.zeros((WIDTH, WIDTH)), rotation(9)]), read)["loss"]
    for layer, held in enumerate(planted.held):
        logits = held.reshape(-1, WIDTH)[read.token]
        loss = logsumexp(logits, axis=1) - logits[np.arange(len(read)), read.target]
        np.testing.assert_allclose(found[[0, 2], layer], loss.mean(), rtol=1e-5)


def test_two_lenses_are_compared_token_by_token(built: str):
    ds = ac.open(built)
    a, b = (random_lens(ac.lens.states(ds), seed) for seed in (1, 2))
    found = ac.lens.compare(a, b, ds)
    one, other = ac.lens.evaluate(a, ds), ac.lens.evaluate(b, ds)
    for name in ("loss", "kl"):
        np.testing.assert_allclose(found[f"{name}_difference"], one[name] - other[name], atol=1e-5)
    low, high = ac.lens.compare(a, replace(a, bias=a.bias * 1.01), ds).interval("loss_difference")
    apart = one.interval("loss")[1] - one.interval("loss")[0]
    assert np.all((high - low)[:-1] < apart[:-1] / 20), "paired: what a document has more of in both is no uncertainty"
    same = ac.lens.compare(a, a, ds)
    assert not same["loss_difference"].any()
    assert not same.interval("kl_difference")[1].any()
    assert found["loss_difference"][-1] == 0, "the last state is read as it is by both"
    ratio = found["loss_difference"][:-1] / found["loss_difference_bits_per_byte"][:-1]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    back = ac.lens.compare(b, a, ds)
    np.testing.assert_allclose(back["kl_difference"], -found["kl_difference"], atol=1e-6)
    shared = random_lens(ac.lens.states(ds), 1, shared=True)
    assert ac.lens.compare(shared, None, ds).facts["a"] == "tuned, shared"
