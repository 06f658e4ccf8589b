"""Measures of iterative inference on states that were made up: what was planted is found, and what was not reads as null."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

import actcache as ac
from actcache.cache.head import Head
from actcache.clients.lens.regression import Moments, ridge
from actcache.clients.lens.sampling import Others, spaced
from actcache.clients.lens.trajectories import depths
from actcache.clients.results import Results
from actcache.clients.states import States
from tests.planted import plant

D, V = 12, 20
SEQUENCES, POSITIONS = 60, 24
NORM = {"op": "layer_norm", "eps": 1e-5, "gain": "gain", "bias": "shift"}
LINEAR = {"op": "linear", "weight": "unembedding"}


def head(generator: np.random.Generator) -> Head:
    arrays = {
        "gain": generator.uniform(0.5, 1.5, D),
        "shift": generator.normal(0, 0.1, D),
        "unembedding": generator.normal(size=(V, D)),
    }
    return Head([NORM, LINEAR], {name: array.astype(np.float32) for name, array in arrays.items()})


def gradients(head: Head, h: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the cross-entropy, by autograd, of states (n, d), and the cross-entropy of each."""
    arrays = {name: torch.from_numpy(array).double() for name, array in head.arrays.items()}
    x = torch.from_numpy(h).double().requires_grad_()
    normed = torch.nn.functional.layer_norm(x, (D,), arrays["gain"], arrays["shift"], 1e-5)
    loss = torch.nn.functional.cross_entropy(
        normed @ arrays["unembedding"].T, torch.from_numpy(target), reduction="none"
    )
    (found,) = torch.autograd.grad(loss.sum(), x)
    return found.numpy(), loss.detach().numpy()


def dataset(layers: list[np.ndarray], path: Path, target: np.ndarray, head: Head) -> States:
    """Planted states, each (sequence · position, d), with what is to be predicted at each."""
    shaped = np.stack([layer.reshape(SEQUENCES, POSITIONS, -1) for layer in layers])
    ds = plant(shaped, path)
    return ac.lens.states(ds, sites=[f"layer{number}" for number in range(len(layers))], head=head, targets=target)


def holds(results: Results, name: str, value: float = 0.0) -> bool:
    low, high = results.interval(name)
    return bool(np.all((low <= value) & (value <= high)))


def noise(generator: np.random.Generator) -> np.ndarray:
    return generator.normal(size=(SEQUENCES * POSITIONS, D)).astype(np.float32)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(5)


def targets(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(V, size=SEQUENCES * POSITIONS)


def test_gradient_steps_are_found(generator, tmp_path: Path):
    model, target = head(generator), targets(generator)
    layers, losses, step = [noise(generator)], [], 0.02
    for _ in range(2):
        gradient, loss = gradients(model, layers[-1], target)
        losses.append((loss, step * np.square(gradient).sum(axis=1)))
        layers.append((layers[-1] - step * gradient).astype(np.float32))
    read = dataset(layers, tmp_path / "ds", target, model)
    found = ac.lens.alignment(ac.lens.identity(read), read)
    np.testing.assert_allclose(found["cosine"], 1, atol=1e-4)
    for control in ("cosine_permuted", "cosine_random"):
        assert np.abs(found[control]).max() < 0.03
    assert found["excess"].min() > 0.95
    assert found.interval("excess_target")[0].min() > 0.3
    np.testing.assert_allclose(found["predicted_decrease"], [each[1].mean() for each in losses], rtol=1e-3)
    np.testing.assert_allclose(found["decrease"][0], (losses[0][0] - losses[1][0]).mean(), rtol=1e-3)
    np.testing.assert_allclose(found["decrease"], found["predicted_decrease"], rtol=0.1)
    assert found.axes("cosine") == ("block",)
    assert found.labels["block"] == ("layer1", "layer2")
    assert found.facts["random_sd"] == pytest.approx(D**-0.5)


def test_random_updates_read_as_null(generator, tmp_path: Path):
    first = noise(generator)
    read = dataset([first, first + noise(generator)], tmp_path / "ds", targets(generator), head(generator))
    found = ac.lens.alignment(ac.lens.identity(read), read)
    names = ("cosine", "cosine_permuted", "cosine_random", "excess", "excess_target", "cosine_centred", "predicted_decrease")  # fmt: skip
    for name in names:
        assert holds(found, name), name
        assert found[name].shape == (1,)


def test_the_mean_update_alone_is_no_excess(generator, tmp_path: Path):
    """Every update is much the same and so is every gradient: the plain cosine is high, and says nothing of the token."""
    model, target = head(generator), np.full(SEQUENCES * POSITIONS, 3)
    first = noise(generator)
    mean = -gradients(model, first, target)[0].mean(axis=0)
    read = dataset([first, (first + 5 * mean + 0.1 * noise(generator)).astype(np.float32)], tmp_path / "ds", target, model)  # fmt: skip
    found = ac.lens.alignment(ac.lens.identity(read), read)
    assert found["cosine"][0] > 0.3
    assert abs(found["cosine_permuted"][0] - found["cosine"][0]) < 0.02
    assert abs(found["excess"][0]) < 0.02
    assert holds(found, "excess")
    assert abs(found["cosine_centred"][0]) < 0.05


def test_leaving_the_present_prediction_is_not_leading_to_what_comes(generator, tmp_path: Path):
    """Each update lowers the most probable token alone: it fits its token, and knows nothing of the target."""
    model, target, first = head(generator), targets(generator), noise(generator)
    best = model.logits(first).argmax(axis=1)
    away = gradients(model, first, best)[0]
    read = dataset([first, (first + 0.1 * away).astype(np.float32)], tmp_path / "ds", target, model)
    found = ac.lens.alignment(ac.lens.identity(read), read)
    assert found.interval("excess")[0][0] > 0.1
    assert holds(found, "excess_target")
    assert abs(found["excess_target"][0]) < 0.03


def test_a_block_that_does_nothing_has_no_cosine(generator, tmp_path: Path):
    first = noise(generator)
    read = dataset([first, first, 2 * first], tmp_path / "ds", targets(generator), head(generator))
    found = ac.lens.alignment(ac.lens.identity(read), read)
    assert np.isnan(found["cosine"][0])
    assert np.isfinite(found["cosine"][1])
    assert found["decrease"][0] == found["predicted_decrease"][0] == 0


def test_through_a_translator_the_lens_is_its_own(generator, tmp_path: Path):
    """Steps along the gradient seen through a lens are found by that lens, and not by the logit lens."""
    model, target, first = head(generator), targets(generator), noise(generator)
    turn = np.linalg.qr(generator.normal(size=(D, D)))[0].astype(np.float32)
    step = gradients(model, first @ turn.T, target)[0] @ turn
    read = dataset([first, (first - 0.1 * step).astype(np.float32)], tmp_path / "ds", target, model)
    plain = ac.lens.identity(read)
    lens = replace(plain, kind="ridge", weight=(turn - np.eye(D, dtype=np.float32))[None])
    found = ac.lens.alignment(lens, read)
    np.testing.assert_allclose(found["cosine"], 1, atol=1e-3)
    np.testing.assert_allclose(found["decrease"], found["predicted_decrease"], rtol=0.2)
    assert np.abs(found["decrease_next_lens"] - found["decrease"]).max() > 0.1, "the last state is read as it is"
    assert abs(ac.lens.alignment(plain, read)["cosine"][0]) < 0.2


def test_errors_that_are_written_are_found_at_their_lag(generator, tmp_path: Path):
    model, target, first = head(generator), targets(generator), noise(generator)
    error = gradients(model, first, target)[0].reshape(SEQUENCES, POSITIONS, D)
    written = np.zeros_like(error)
    written[:, 2:] = error[:, :-2] @ generator.normal(size=(D, D))
    second = first + written.reshape(-1, D) + 0.05 * written.std() * noise(generator)
    random = second + noise(generator)
    read = dataset([first, second.astype(np.float32), random.astype(np.float32)], tmp_path / "ds", target, model)
    found = ac.lens.error_prediction(ac.lens.identity(read), read, lags=(1, 2))
    assert found["errors"].shape == (2, 2)
    assert found["errors"][0, 1] > 0.98
    assert found["increment"][0, 1] > 0.5
    assert found["excess"][0, 1] > 0.2
    assert found.interval("excess")[0][0, 1] > 0.2
    null = np.array([[True, False], [True, True]])
    for name in ("errors", "increment", "excess", "earlier_state"):
        assert np.abs(found[name][null]).max() < 0.1, name
    for name in ("errors_shuffled", "increment_shuffled"):
        assert found[name].max() < 0.02, name
        assert found[name].min() > -0.1, name
    assert found.interval("errors_shuffled")[0].max() <= 0.01
    assert found.facts["held_out_documents"] >= 10


def test_an_update_of_what_a_token_is_is_no_error(generator, tmp_path: Path):
    """Errors tell which token came, and so does the state there: they predict the update, and add nothing to what states do."""
    model, target = head(generator), targets(generator)
    came = np.roll(target, 1)
    embedding = 2 * generator.normal(size=(V, D))
    first = (embedding[came] + 0.3 * noise(generator)).astype(np.float32)
    second = first + first @ generator.normal(size=(D, D)) + 0.1 * noise(generator)
    read = dataset([first, second.astype(np.float32)], tmp_path / "ds", target, model)
    found = ac.lens.error_prediction(ac.lens.identity(read), read, lags=(1,))
    assert found["errors"][0, 0] > 0.1
    assert found["states"][0, 0] > 0.95
    assert abs(found["increment"][0, 0]) < 0.01
    assert found.interval("excess")[0][0, 0] < 0.001


def test_an_update_that_looks_up_a_token_is_no_error(generator, tmp_path: Path):
    """It is no linear function of states, and errors tell the token: so does what came alone, of which nothing was predicted."""
    model, target = Head([LINEAR], {"unembedding": head(generator).arrays["unembedding"]}), targets(generator)
    came = np.roll(target, 1)
    embedding, table = (generator.normal(size=(V, D)) for _ in range(2))
    first = (embedding[came] + 0.1 * noise(generator)).astype(np.float32)
    second = (first + table[came] + 0.1 * noise(generator)).astype(np.float32)
    read = dataset([first, second], tmp_path / "ds", target, model)
    found = ac.lens.error_prediction(ac.lens.identity(read), read, lags=(1,))
    assert found["increment"][0, 0] > 0.2
    assert found["excess"][0, 0] < 0.01
    assert found.interval("excess")[0][0, 0] < 0.001


def test_controls_are_of_another_document_where_one_has_nearly_all():
    documents = np.repeat([0, 1, 2], [5, 990, 5])
    others = Others(None, None, None, documents)  # type: ignore[arg-type]
    for document in (0, 1, 2):
        drawn = others.draw(np.full(4000, document), np.random.default_rng(0))
        assert (documents[drawn] != document).all()
    drawn = others.draw(np.ones(4000, int), np.random.default_rng(0))
    assert np.bincount(drawn, minlength=1000)[documents != 1].min() > 250
    alone = Others(None, None, None, np.zeros(10, int))  # type: ignore[arg-type]
    assert len(np.unique(alone.draw(np.zeros(99, int), np.random.default_rng(0)))) > 5


def test_lags_that_make_no_sense(generator, tmp_path: Path):
    first = noise(generator)
    read = dataset([first, first + noise(generator)], tmp_path / "ds", targets(generator), head(generator))
    lens = ac.lens.identity(read)
    for lags in ((), (0,), (1, 1)):
        with pytest.raises(ac.InvalidInput, match="lags="):
            ac.lens.error_prediction(lens, read, lags=lags)
    with pytest.raises(ac.InvalidInput, match=f"{POSITIONS} apart"):
        ac.lens.error_prediction(lens, read, lags=(POSITIONS,))


def test_lags_stay_within_pieces_and_sequences(generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same numbers from pieces of any length: what is kept of a piece is what the next one needs."""
    first = noise(generator)
    read = dataset([first, first + noise(generator)], tmp_path / "ds", targets(generator), head(generator))
    lens = ac.lens.identity(read)
    whole = ac.lens.error_prediction(lens, read, lags=(1, 5))
    from actcache.clients import states as module

    monkeypatch.setattr(module, "MOST_ROWS", 7)
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    small = ac.lens.error_prediction(lens, read, lags=(1, 5))
    for name in ("errors", "earlier_state", "states", "increment_expected"):
        np.testing.assert_allclose(small[name], whole[name], atol=1e-4)


def test_the_regression_is_that_of_scikit_learn(generator):
    x = generator.normal(size=(400, 15)) * generator.uniform(0.1, 10, 15) + generator.normal(size=15)
    y = x @ generator.normal(size=(15, 4)) + 20 * generator.normal(size=(400, 4)) + 3
    moments = Moments.empty(15, 4)
    for part in np.array_split(np.arange(400), 7):
        moments.add(x[part].astype(np.float32), y[part].astype(np.float32))
    columns = np.array([0, 3, 4, 9, 14])
    found = ridge(moments, columns)
    scaler = StandardScaler().fit(x[:, columns])
    want = Ridge(alpha=400 * found.penalty).fit(scaler.transform(x[:, columns]), y)
    np.testing.assert_allclose(found.predict(x), want.predict(scaler.transform(x[:, columns])), rtol=1e-3, atol=1e-2)
    chosen = RidgeCV(alphas=400 * np.logspace(-8, 2, 41)).fit(scaler.transform(x[:, columns]), y)
    assert abs(np.log10(chosen.alpha_ / (400 * found.penalty))) <= 0.5
    constant = Moments.empty(2, 1)
    constant.add(np.ones((9, 2), np.float32), np.arange(9, dtype=np.float32)[:, None])
    np.testing.assert_allclose(ridge(constant, np.arange(2)).predict(np.ones((1, 2))), 4)


def test_prediction_depth_is_exact(generator, tmp_path: Path):
    """States that are logits themselves, of tokens whose depth was drawn."""
    layers, n = 5, SEQUENCES * POSITIONS
    wanted, final = generator.integers(layers, size=n), generator.integers(V, size=n)
    wanted[0] = layers - 1
    states = []
    for layer in range(layers):
        before = (final + generator.integers(1, V, size=n)) % V
        lucky = (layer < wanted - 1) & (generator.random(n) < 0.5)  # right for a while, and then not
        best = np.where((layer >= wanted) | lucky, final, before)
        logits = generator.normal(size=(n, V))
        logits[np.arange(n), best] += 12
        states.append(logits.astype(np.float32))
    target = targets(generator)
    read = dataset(states, tmp_path / "ds", target, Head([], {}))
    found = ac.lens.trajectories(ac.lens.identity(read), read)
    np.testing.assert_array_equal(found.depth, wanted)
    np.testing.assert_array_equal(found.token, np.arange(n))
    np.testing.assert_allclose(found["share"], np.bincount(wanted, minlength=layers) / n)
    np.testing.assert_allclose(found["depth"], wanted.mean())
    log = torch.log_softmax(torch.from_numpy(np.stack(states)).double(), -1).numpy()
    at = log[:, np.arange(n), target]
    rank = 1 + (log > at[..., None]).sum(-1)
    np.testing.assert_allclose(found["target_probability"], np.exp(at).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found["target_rank"], rank.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["target_reciprocal_rank"], (1 / rank).mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.loss, -at[-1], rtol=1e-4, atol=1e-4)
    quarter = found.loss >= np.quantile(found.loss, 0.75)
    np.testing.assert_allclose(found["depth_by_loss"][-1], wanted[quarter].mean())
    chance = 1 / V  # final tokens are uniform, so that any other one agrees by that
    np.testing.assert_allclose(found["share_shuffled"][-1], 1 - chance, atol=0.03)
    assert found["depth_shuffled"] > found["depth"] + 1
    low, high = found.interval("depth")
    assert low < wanted.mean() < high


def test_depth_of_a_trajectory():
    best = np.array([[1, 2, 3, 5], [1, 2, 0, 4], [1, 0, 3, 4], [1, 2, 3, 4]])
    np.testing.assert_array_equal(depths(best), [0, 3, 2, 1])


def test_tokens_ahead_are_found_where_they_are_and_not_elsewhere(generator, tmp_path: Path):
    """The middle state knows the token after the next; nothing knows the one after that. Tokens follow no rule."""
    target = targets(generator).reshape(SEQUENCES, POSITIONS)
    unembedding = np.linalg.qr(generator.normal(size=(V, V)))[0][:, :V].astype(np.float32)
    model = Head([{"op": "linear", "weight": "u"}], {"u": unembedding})
    final = 8 * unembedding[target]
    ahead = np.roll(final, -1, axis=1) @ generator.normal(size=(V, V))
    first = generator.normal(size=final.shape)
    layers = [each.reshape(-1, V).astype(np.float32) for each in (first, ahead, final)]
    read = dataset(layers, tmp_path / "ds", target.reshape(-1), model)
    found = ac.lens.future(read, offsets=(0, 1, 2))
    accuracy = found["accuracy"]
    assert accuracy.shape == (3, 3)
    assert accuracy[2, 0] == 1
    assert accuracy[1, 1] > 0.95
    for name in ("gain_over_first", "gain_over_unigram"):
        assert found.interval(name)[0][1, 1] > 1
        assert found.interval(name)[0][2, 0] > 1
    assert found["loss"][1, 1] < found["loss_unigram"][1] - 1
    null = np.ones((3, 3), bool)
    null[2, 0] = null[1, 1] = False
    assert np.abs(accuracy[null] - 1 / V).max() < 0.05
    assert found["loss"][null].min() > found["loss_unigram"].min() - 0.05
    there = ~np.isnan(found["loss_shuffled"])
    assert np.isnan(found["loss_shuffled"][2, 0])
    assert there.sum() == 8
    assert found["accuracy_shuffled"][there].max() < 3 / V
    assert found["loss_shuffled"][there].min() > np.log(V) - 0.05
    assert found["gain_over_first"][0].max() == 0
    assert found["gain_over_unigram"][null].max() < 0.05
    assert found.interval("gain_over_unigram")[0][null].max() < 0
    assert np.abs(found["accuracy_over_unigram"][null]).max() < 0.07
    np.testing.assert_allclose(found["loss_unigram"], np.log(V), atol=0.1)


def test_a_trained_lens_of_random_pairs_knows_nothing(generator, tmp_path: Path):
    """The control of a trained lens is trained on random pairs too, and not on the true ones."""
    target = targets(generator)
    final = 4 * np.eye(V, dtype=np.float32)[target]
    first = final @ generator.normal(size=(V, V)).astype(np.float32)
    model = Head([{"op": "linear", "weight": "u"}], {"u": np.eye(V, dtype=np.float32)})
    read = dataset([first, final], tmp_path / "ds", target, model)
    found = ac.lens.future(read, offsets=(0,), kind="tuned", tokens=20_000, precision="float32")
    assert found["accuracy"][0, 0] > 0.95
    assert found["accuracy_shuffled"][0, 0] < 3 / V
    assert found["loss_shuffled"][0, 0] > np.log(V) - 0.05


def test_what_cannot_be_looked_ahead_to(generator, tmp_path: Path):
    first = noise(generator)
    read = dataset([first, first + noise(generator)], tmp_path / "ds", targets(generator), head(generator))
    with pytest.raises(ac.InvalidInput, match="offsets="):
        ac.lens.future(read, offsets=(-1,))
    with pytest.raises(ac.InvalidInput, match=f"{POSITIONS} tokens later"):
        ac.lens.future(read, offsets=(POSITIONS,))
    later = replace(read, offset=1)
    with pytest.raises(ac.InvalidInput, match="offset=0"):
        ac.lens.future(later)
    ahead = replace(ac.lens.identity(read), offset=1, weight=np.zeros((2, D, D)), bias=np.zeros((2, D)))
    for measure in (ac.lens.trajectories, ac.lens.error_prediction):
        with pytest.raises(ac.InvalidInput, match="offset=0"):
            measure(ahead, read)


def test_real_states_and_selections(built: str):
    """All of it runs on a small GPT-2; sequences are spaced over what is given; the same seed gives the same numbers."""
    ds = ac.open(built)
    assert len(spaced(ds, None)) == len(ac.lens.states(ds))
    some = spaced(ds, 200)
    assert 0 < len(some) <= 200
    assert some.groups.count > spaced(ds, 40).groups.count
    late = ds.where(position__ge=3)
    chosen = spaced(late, 150)
    assert (ds.tokens["position"][chosen.token] >= 3).all()
    others = Others.of(some, 0)
    drawn = others.draw(some.groups.of, np.random.default_rng(0))
    assert (others.document[drawn] != some.groups.of).mean() > 0.99
    np.testing.assert_allclose(others.states[1], ds.resid[1].compute()[others.read.token])
    lens = ac.lens.identity(some)
    found = ac.lens.alignment(lens, ds, max_tokens=200)
    again = ac.lens.alignment(lens, some)
    np.testing.assert_array_equal(found["excess"], again["excess"])
    loss = ac.lens.evaluate(lens, some)["loss"]
    np.testing.assert_allclose(found["decrease"], -np.diff(loss), atol=1e-4)
    np.testing.assert_allclose(found["decrease_next_lens"], found["decrease"], atol=1e-6)
    untrained = ac.lens.alignment(lens, ds)
    assert np.abs(untrained["excess"]).max() < 0.02, "weights that were drawn at random descend nothing"
    assert np.abs(untrained["excess_target"]).max() < 0.02
    depth = ac.lens.trajectories(lens, some)
    assert depth["share"].sum() == pytest.approx(1)
    np.testing.assert_allclose(depth.loss.mean(), loss[-1], rtol=1e-4)
    assert "depth" in repr(depth)
    assert depth.to_dict()["measures"]["depth"]["unit"] == "layers"
