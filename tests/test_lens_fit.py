"""Lenses fitted on datasets: against closed forms and torch, on planted truths, and when interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.clients.bootstrap import Groups
from actcache.clients.lens.ridge import PENALTIES, grams, ridge
from actcache.clients.lens.training import Course, Progress, Training
from actcache.clients.states import States
from tests.planted import plant

WIDTH, POSITIONS, SEQUENCES, VOCABULARY = 6, 16, 240, 9


def readout(seed: int = 0) -> ac.lens.Head:
    """A head as a GPT's: a norm and an unembedding."""
    generator = np.random.default_rng(seed)
    arrays = {
        "g": generator.uniform(0.5, 1.5, WIDTH).astype(np.float32),
        "u": generator.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
    }
    operations = [{"op": "layer_norm", "eps": 1e-5, "gain": "g"}, {"op": "linear", "weight": "u"}]
    return ac.lens.Head(operations, arrays)


def planted(folder: Path, layers: list[np.ndarray], name: str) -> States:
    """States (sequence, position, d) of each layer, with targets drawn from what the head makes of the last."""
    ds = plant(np.stack(layers), folder / name, name)
    head = readout()
    logits = head.logits(layers[-1].reshape(-1, WIDTH))
    gumbel = np.random.default_rng(1).gumbel(size=logits.shape)
    return ac.lens.states(ds, sites=ds.sites, head=head, targets=(logits + gumbel).argmax(axis=1))


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SEQUENCES, POSITIONS, WIDTH)).astype(np.float32)


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> States:
    """Each layer is the last one in a basis of its own, moved by a constant."""
    last = normal(0)
    moved = [last @ rotation(seed) + np.float32(seed) for seed in (1, 2)]
    return planted(tmp_path_factory.mktemp("rotated"), [*moved, last], "rotated")


def test_a_ridge_lens_undoes_what_is_affine(rotated: States):
    lens = ac.lens.fit(rotated, "ridge")
    found = ac.lens.evaluate(lens, rotated)
    assert found["kl"].max() < 1e-4
    np.testing.assert_allclose(found["loss"], found["loss"][-1], atol=0.01)
    for layer in (0, 1):
        inverse = np.eye(WIDTH) + lens.weight[layer]
        np.testing.assert_allclose(inverse, rotation(layer + 1), atol=2e-3)


def test_a_shared_lens_reads_one_code_and_no_rotations(rotated: States, tmp_path: Path):
    """Where all layers have one affine code, one translator does as well as each layer's own; where each is rotated, it cannot."""
    last, turn = normal(3), rotation(9)
    same = planted(tmp_path, [last @ turn, last @ turn, last], "same")
    one = ac.lens.fit(same, "ridge", shared=True)
    assert one.weight.shape == (1, WIDTH, WIDTH)
    cost = ac.lens.compare(one, ac.lens.fit(same, "ridge"), same)
    assert np.abs(cost["kl_difference"]).max() < 1e-4
    cost = ac.lens.compare(ac.lens.fit(rotated, "ridge", shared=True), ac.lens.fit(rotated, "ridge"), rotated)
    assert cost.interval("kl_difference")[0][:2].min() > 0.1


def test_a_lens_of_what_says_nothing_says_nothing(tmp_path: Path):
    """A layer that is independent of the last one: the lens is left with the mean prediction, and its KL shows it."""
    read = planted(tmp_path, [normal(5), normal(6)], "independent")
    _, outside = read.split()
    head = read.head
    final = torch.log_softmax(torch.from_numpy(head.logits(read.ds["layer1"].compute())), -1)
    share = np.bincount(read.target, minlength=VOCABULARY) / len(read)
    best = float((final.exp() * (final - torch.from_numpy(np.log(share)))).sum(-1).mean())
    for kind in ("ridge", "tuned"):
        kl = ac.lens.evaluate(ac.lens.fit(read, kind), outside)["kl"][0]  # type: ignore[arg-type]
        assert kl > 0.8 * best


@pytest.mark.parametrize("shared", [False, True])
def test_the_closed_form_is_ridge_regression(rotated: States, shared: bool):
    """Against scikit-learn, at the penalty that was chosen, on the same tokens."""
    from sklearn.linear_model import Ridge

    read, _ = rotated.split()
    found = grams(read, shared)
    lens = ridge(read, shared, found)
    final = read.ds["layer2"].compute()[read.token]
    states = [read.ds[f"layer{layer}"].compute()[read.token] for layer in (0, 1)]
    groups = (
        [(np.concatenate(states), np.concatenate([final, final]))] if shared else [(each, final) for each in states]
    )
    for number, (x, y) in enumerate(groups):
        assert found[number].penalty in PENALTIES
        values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
        want = Ridge(alpha=found[number].penalty * values.mean() * len(x)).fit(x.astype(float), (y - x).astype(float))
        np.testing.assert_allclose(lens.weight[number], want.coef_, atol=2e-5)
        np.testing.assert_allclose(lens.bias[number], want.intercept_, atol=2e-5)


def test_a_useless_layer_gets_a_large_penalty(tmp_path: Path):
    """The penalty is chosen by documents that were not fitted on: least where all is told, greatest where nothing is."""
    last = normal(7)
    few = [each[:20] for each in (last @ rotation(1), normal(8), last)]
    ds = plant(np.stack(few), tmp_path / "few", "few")
    read = ac.lens.states(ds, sites=ds.sites, head=readout(), targets=np.zeros(ds.n_tokens, int))
    told, untold = grams(read)
    assert told.penalty < 1e-3 < untold.penalty


def test_the_zeroth_step_is_the_logit_lens_exactly(built: str):
    ds = ac.open(built)
    read, _ = ac.lens.states(ds).split(0.2)
    lens = ac.lens.identity(read)
    assert Training(read, lens, grams(read), Course(64, 1)).lens is lens
    logit, zero = ac.lens.logit(ds), ac.lens.evaluate(lens, ds)
    for name in logit:
        np.testing.assert_array_equal(logit[name], zero[name])
    h = ds.resid[1].compute()
    np.testing.assert_array_equal(lens.translate(1, h), h)
    np.testing.assert_array_equal(lens.logits(ds.head, 1, h), ds.head.logits(h))


@pytest.mark.parametrize(
    ("start", "precision", "tokens"),
    [("ridge", "float32", 80_000), ("ridge", "bfloat16", 80_000), ("zero", "float32", 240_000)],  # zero is far away
)
def test_training_reaches_the_best_lens(tmp_path: Path, start: str, precision: str, tokens: int):
    """A layer of which least squares is not the best reading: some tokens lie far out, along one line. Against L-BFGS by autograd."""
    last = normal(11)
    wild = last @ rotation(3) + np.where(np.arange(POSITIONS)[:, None] % 5 == 0, 3, 0.3).astype(np.float32) * normal(12)
    read = planted(tmp_path, [wild, last], "wild")
    inside, outside = read.split()
    lens = ac.lens.fit(read, start=start, precision=precision, tokens=tokens)  # type: ignore[arg-type]
    x, y = (torch.from_numpy(read.ds[site].compute()[inside.token]).double() for site in read.sites)
    g, u = (torch.from_numpy(read.head.arrays[name]).double() for name in ("g", "u"))
    final = torch.log_softmax(torch.nn.functional.layer_norm(y, (WIDTH,), g) @ u.T, -1)
    w = torch.zeros(WIDTH, WIDTH, dtype=torch.double, requires_grad=True)
    b = torch.zeros(WIDTH, dtype=torch.double, requires_grad=True)

    def loss() -> torch.Tensor:
        found = torch.log_softmax(torch.nn.functional.layer_norm(x + x @ w.T + b, (WIDTH,), g) @ u.T, -1)
        return (final.exp() * (final - found)).sum(-1).mean()

    optimiser = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    best = float(loss().detach())
    mine = ac.lens.evaluate(lens, inside)["kl"][0]
    least_squares = ac.lens.evaluate(ac.lens.fit(read, "ridge"), inside)["kl"][0]
    assert best < 0.97 * least_squares, "else there is nothing to train for"
    assert mine < best + 0.02 * best + 1e-3
    assert lens.facts["held_out"]["kl"][0] == pytest.approx(ac.lens.evaluate(lens, outside)["kl"][0])


@pytest.mark.parametrize("left", [1, 40])
def test_an_epoch_has_no_short_step(tmp_path: Path, left: int):
    """A few tokens more than whole steps do no harm: as a step of their own they would be all noise, and undo the others."""
    last = normal(11)
    read = planted(tmp_path, [last @ rotation(3) + 0.3 * normal(12), last], "left")
    whole = 2 * 16 * WIDTH
    kl = []
    for n in (whole, whole + left):
        part = read.only(np.arange(n))
        course = Course.of(part, 40 * n)
        assert n - course.size < course.size * (n // course.size) <= n
        assert course.size >= 16 * WIDTH
        lens = Training(part, ac.lens.identity(part), grams(part), course, precision="float32").run()
        kl.append(ac.lens.evaluate(lens, part)["kl"][0])
    assert kl[1] < 1.2 * kl[0] + 0.01
    assert Course.of(read, None).steps <= 4 * len(read) / Course.of(read, None).size


def test_training_never_leaves_a_layer_worse(tmp_path: Path):
    """Predictions so sure that no drawn token tells of the curvature, and a least-squares map that is exact already."""
    last = normal(13)
    ds = plant(np.stack([last @ rotation(2), last]), tmp_path / "sure", "sure")
    head = readout()
    sure = ac.lens.Head(head.operations, {**head.arrays, "u": head.arrays["u"] * 300})
    read = ac.lens.states(ds, sites=ds.sites, head=sure, targets=np.zeros(ds.n_tokens, int))
    inside, _ = read.split()
    tuned, ridge = ac.lens.fit(read, precision="float32"), ac.lens.fit(read, "ridge")
    assert ac.lens.evaluate(tuned, inside)["kl"][0] <= 1.01 * ac.lens.evaluate(ridge, inside)["kl"][0] + 1e-3


def test_an_interrupted_training_ends_as_if_it_had_not_been(
    built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("actcache.clients.lens.checkpoint.SECONDS", 0.0)
    ds, file = ac.open(built), tmp_path / "state"
    options = {"held_out": 0.2, "tokens": 6000, "seed": 3, "device": "cpu"}
    whole = ac.lens.fit(ds, **options)  # type: ignore[arg-type]

    class Stopped(Exception):
        pass

    def stop(at: int):
        def report(state: Progress) -> None:
            if state.step == at:
                raise Stopped

        return report

    steps = whole.facts["steps"]
    assert steps > 8
    for at in (3, steps - 2):
        with pytest.raises(Stopped):
            ac.lens.fit(ds, **options, checkpoint=file, report=stop(at))  # type: ignore[arg-type]
        assert file.is_file()
    with pytest.raises(ac.InvalidInput, match="a training with seed 3, not 4"):
        ac.lens.fit(ds, **{**options, "seed": 4}, checkpoint=file)  # type: ignore[arg-type]
    seen: list[int] = []
    again = ac.lens.fit(ds, **options, checkpoint=file, report=lambda state: seen.append(state.step))  # type: ignore[arg-type]
    assert seen[0] > 3
    np.testing.assert_array_equal(again.weight, whole.weight)
    np.testing.assert_array_equal(again.bias, whole.bias)
    assert not file.exists()


@pytest.mark.parametrize("kind", ["ridge", "tuned"])
def test_held_out_documents_decide_nothing(built: str, kind: str):
    """What is fitted does not change with the tokens that are held out."""
    ds = ac.open(built)
    read = ac.lens.states(ds)
    inside, outside = read.split(0.2, seed=1)
    assert not set(ds.tokens["document"][inside.token]) & set(ds.tokens["document"][outside.token])
    assert len(inside) + len(outside) == len(read)
    lens = ac.lens.fit(read, kind, held_out=0.2, seed=1, tokens=2000)  # type: ignore[arg-type]
    assert lens.facts["tokens"] == len(inside)
    assert lens.facts["held_out"]["tokens"] == len(outside)


def test_a_lens_is_a_file(built: str, tmp_path: Path):
    ds = ac.open(built)
    lens = ac.lens.fit(ds, "ridge", held_out=0.2, target_offset=2, shared=True)
    path = ac.lens.save(lens, tmp_path / "a.lens")
    again = ac.lens.load(path)
    for name in ("kind", "sites", "shared", "offset", "model", "facts"):
        assert getattr(again, name) == getattr(lens, name)
    np.testing.assert_array_equal(again.weight, lens.weight)
    assert again.facts["dataset"] == ds.key
    assert "held-out" in str(again.held_out())
    (tmp_path / "b").write_bytes(b"nothing of the kind")
    for wrong, said in ((tmp_path / "b", "no lens"), (tmp_path / "c", "no such file")):
        with pytest.raises(ac.ActcacheError, match=said):
            ac.lens.load(wrong)


def test_a_lens_is_for_one_model_and_one_purpose(built: str, rotated: States, tmp_path: Path):
    ds = ac.open(built)
    lens = ac.lens.fit(ds, "ridge", held_out=0.2)
    with pytest.raises(ac.SpecMismatch, match="made for another model"):
        ac.lens.evaluate(lens, rotated)
    with pytest.raises(ac.InvalidInput, match="looks 0 tokens ahead"):
        ac.lens.evaluate(lens, ac.lens.states(ds, offset=1))
    with pytest.raises(ac.InvalidInput, match="the lens reads"):
        ac.lens.evaluate(lens, ac.lens.states(ds, sites=ds.residual_sites[1:]))


def test_wrong_arguments_get_clear_answers(built: str, rotated: States):
    ds = ac.open(built)
    for options, said in (
        ({"kind": "best"}, "there is 'ridge' and 'tuned'"),
        ({"start": "here"}, "there is 'ridge' and 'zero'"),
        ({"held_out": 1.5}, "a share between 0 and 1"),
        ({"tokens": 0}, "at least 1"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"precision": "int4"}, "precision='int4'"),
        ({"target_offset": -1}, "at least 0"),
        ({"target_offset": 10_000}, "10000 tokens later"),
    ):
        with pytest.raises(ac.InvalidInput, match=said):
            ac.lens.fit(ds, **options)  # type: ignore[arg-type]
    with pytest.raises(ac.InvalidInput, match="look 0 tokens ahead"):
        ac.lens.fit(rotated, target_offset=2)
    with pytest.raises(ac.InvalidInput, match="at least two"):
        ac.lens.states(ds, sites=ds.sites[:1])
    with pytest.raises(ac.InvalidInput, match="whole numbers are asked for"):
        ac.lens.states(ds, targets=np.zeros(3))
    with pytest.raises(ac.InvalidInput, match="is to be predicted"):
        ac.lens.states(ds, targets=np.full(ds.n_tokens, 10**6))


def test_one_document_is_divided_by_sequence_and_says_so(model: Path, tmp_path: Path):
    text = tmp_path / "one.txt"
    text.write_text("a few words of one document. " * 40)
    ac.build(ac.Spec(model=str(model), corpus=(str(text),)), tmp_path / "one")
    ds = ac.open(tmp_path / "one")
    with pytest.warns(UserWarning, match=r"too few documents \(1\) to hold some out"):
        lens = ac.lens.fit(ds, "ridge")
    assert lens.facts["sequences"] > 1


def test_overlapping_sequences_are_not_held_out_unnoticed(
    model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    text = tmp_path / "one.txt"
    text.write_text("".join(f"a few words, {number} of them. " for number in range(60)))
    for long, stride in (("split", None), ("stride", 4)):
        ac.build(ac.Spec(model=str(model), corpus=(str(text),), context=16, long=long, stride=stride), tmp_path / long)
        recwarn.clear()
        ac.lens.states(ac.open(tmp_path / long)).split()
        said = [str(each.message) for each in recwarn if "sequences overlap" in str(each.message)]
        assert len(said) == (long == "stride")


@pytest.mark.parametrize("sizes", [[900, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10], [500, 400, 30, 40, 30]])
def test_a_long_document_is_not_most_of_what_is_held_out(rotated: States, sizes: list[int]):
    of = np.repeat(np.arange(len(sizes)), sizes)
    read = replace(rotated.only(np.arange(len(of))), groups=Groups(of, len(sizes), "document"))
    for seed in range(20):
        inside, outside = read.split(0.1, seed)
        assert 0 < len(outside) <= 0.2 * len(read)
        assert len(inside) + len(outside) == len(read)
        assert not set(of[inside.token]) & set(of[outside.token])
