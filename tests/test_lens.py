"""The logit lens against torch, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import actcache as ac
from actcache.cache.head import Head
from actcache.clients.evaluation import Prediction
from actcache.schemas.errors import Unsupported


def test_the_logit_lens_is_the_models_head_on_every_state(built: str, model: Path):
    ds = ac.open(built)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    states = torch.from_numpy(ds.resid.compute())
    ids = torch.from_numpy(ds.tokens["token_id"].astype(np.int64))
    inside = torch.ones(ds.n_tokens, dtype=torch.bool)
    inside[torch.from_numpy(ds.sequence_start[1:].copy()) - 1] = False
    at = inside.nonzero().flatten()
    with torch.inference_mode():
        logs = torch.log_softmax(plain.lm_head(plain.transformer.ln_f(states[:, at])), dim=-1).double()
    want = {
        "loss": -logs[:, torch.arange(len(at)), ids[at + 1]].mean(dim=1),
        "kl": (logs[-1].exp() * (logs[-1] - logs)).sum(dim=-1).mean(dim=1),
        "entropy": -(logs.exp() * logs).sum(dim=-1).mean(dim=1),
        "agreement": (logs.argmax(dim=-1) == logs[-1].argmax(dim=-1)).double().mean(dim=1),
    }
    found = ac.lens.logit(ds)
    assert set(found) == set(want)
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["loss"][-1], np.nanmean(ds["loss"].compute()), rtol=1e-5)


def test_only_the_first_tokens(built: str):
    ds = ac.open(built)
    few = ac.lens.logit(ds, max_tokens=40)
    inside = ~np.isnan(ds["loss"].compute()[:40])
    np.testing.assert_allclose(few["loss"][-1], ds["loss"].compute()[:40][inside].mean(), rtol=1e-5)
    with pytest.raises(ac.InvalidInput, match="give at least 1"):
        ac.lens.logit(ds, max_tokens=0)


def test_an_operation_of_a_later_version_is_refused():
    with pytest.raises(Unsupported, match="'swirl'"):
        Head([{"op": "swirl", "value": 30.0}], {}).logits(np.zeros((1, 2)))
    for damaged in ({"op": "softcap"}, {"op": "scale", "factor": float("nan")}, {"op": "first", "rows": 9.0}):
        with pytest.raises(ac.Corrupt, match="does not fit vectors of"):
            Head([damaged], {}).check(2)
    with pytest.raises(ac.Corrupt, match="names no array"):
        Head([{"op": "linear", "weight": "absent"}], {}).logits(np.zeros((1, 2)))
    for weight in (np.zeros((5, 3)), np.zeros(2)):
        with pytest.raises(ac.Corrupt, match="does not fit vectors of"):
            Head([{"op": "linear", "weight": "w"}], {"w": weight}).check(2)
    for norm in ({"gain": "g", "bias": "g"}, {"eps": 1e-5, "gain": "g", "bias": "w"}):
        with pytest.raises(ac.Corrupt, match="does not fit vectors of"):
            Head([{"op": "layer_norm", **norm}], {"g": np.zeros(2), "w": np.zeros(3)}).check(2)


def test_the_bundled_model_is_trained(tmp_path: Path):
    """On text that it was held from: far below the unigram entropy, and better with every late layer."""
    import sysconfig

    import examples.training as training

    folder = Path(__file__).parent.parent / "examples/tiny-gpt"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 << 20
    held = [p for p in Path(sysconfig.get_path("stdlib")).glob("*.py") if training.held_out(p)]
    assert held
    spec = ac.Spec(model=str(folder), corpus=tuple(map(str, held)), max_tokens=20_000)
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    measures = ac.lens.logit(ds, max_tokens=6_000)
    counts = np.bincount(ds.tokens["token_id"])
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    assert measures["loss"][-1] < entropy - 1.5, "20,000 tokens have a lower unigram entropy than half a million"
    assert np.all(np.diff(measures["kl"][2:]) < 0)
    assert measures["agreement"][-2] > 0.3


def test_a_selection_is_read_too(built: str):
    """The tokens selected, each with the successor that it has in the dataset."""
    ds = ac.open(built)
    chosen = ds.tokens["position"] == 1
    loss = ds["loss"].compute()[chosen]
    found = ac.lens.logit(ds.where(position=1))
    np.testing.assert_allclose(found["loss"][-1], loss[~np.isnan(loss)].mean(), rtol=1e-5)


def test_what_is_impossible_counts_nothing():
    """Rows that pad a vocabulary can have logits of -inf: the measures are those without them."""
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    padded = np.concatenate([logits, np.full((2, 5, 3), -np.inf, np.float32)], axis=2)
    target = np.arange(5)
    want, found = (Prediction.of(each[0]).measures(Prediction.of(each[1]), target) for each in (logits, padded))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_few_tokens_of_many_are_read_alone(built: str, monkeypatch: pytest.MonkeyPatch):
    ds = ac.open(built)
    some = ds.where(position=3)
    want = ac.lens.states(some)
    monkeypatch.setattr("actcache.clients.states.MOST_SPANNED", 1)
    monkeypatch.setattr("actcache.clients.states.SPARSE", 1)
    found = ac.lens.states(some)
    for name in ("token", "target"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
    np.testing.assert_array_equal(found.groups.of, want.groups.of)


def test_intervals_of_few_documents_say_so(built: str):
    read = ac.lens.states(ac.open(built))
    few = read.only(np.flatnonzero(read.groups.of < 3))
    assert "of 3 too narrow" in ac.lens.logit(few).facts["intervals"]
    assert "intervals" not in read.only(np.flatnonzero(read.groups.of == 0)).facts()
