"""Per-token outputs: against plain torch on the model's own logits, ties and slices, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import actcache as ac
from actcache.jobs import loaded, outputs
from actcache.jobs.parts import ModelParts
from actcache.schemas.errors import Corrupt
from actcache.schemas.outputs import parse_outputs
from actcache.schemas.root_document import parse_root
from tests.models import save_gpt2
from tests.test_records import change

K = 5
NAMES = ["loss", "entropy", "topk/logit", "topk/token_id", "topk/log_normalizer"]


@pytest.fixture(scope="module")
def asked(spec: ac.Spec) -> ac.Spec:
    return spec.model_copy(update={"sites": "blocks.0.hook_resid_pre", "outputs": ("entropy", "loss", f"topk={K}")})


@pytest.fixture(scope="module")
def sealed(asked: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("outputs") / "ds.zarr")
    ac.build(asked, url)
    return url


def test_outputs_are_those_of_the_models_own_logits(sealed: str, model: Path, built: str):
    ds = ac.open(sealed)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    found = {name: ds[name].compute() for name in NAMES}
    assert {name: (values.dtype.name, values.shape) for name, values in found.items()} == {
        "loss": ("float32", (ds.n_tokens,)),
        "entropy": ("float32", (ds.n_tokens,)),
        "topk/logit": ("float32", (ds.n_tokens, K)),
        "topk/token_id": ("int32", (ds.n_tokens, K)),
        "topk/log_normalizer": ("float32", (ds.n_tokens,)),
    }
    for low, high in zip(ds.sequence_start[:-1], ds.sequence_start[1:], strict=True):
        ids = torch.from_numpy(ds.tokens["token_id"][low:high].astype(np.int64))
        with torch.inference_mode():
            logits = plain(input_ids=ids[None]).logits[0].double()
        logs = torch.log_softmax(logits, dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1).numpy()
        np.testing.assert_allclose(found["entropy"][low:high], entropy, rtol=1e-5)
        values, places = logits.topk(K)
        np.testing.assert_allclose(found["topk/logit"][low:high], values.numpy(), rtol=1e-4, atol=1e-5)
        assert (found["topk/token_id"][low:high] == places.numpy()).mean() > 0.99
        log_probability = found["topk/logit"] - found["topk/log_normalizer"][:, None]
        taken = logs.gather(-1, torch.from_numpy(found["topk/token_id"][low:high].astype(np.int64)))
        np.testing.assert_allclose(log_probability[low:high], taken.numpy(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(found["entropy"]).all(), "entropy is defined at a sequence's last token, too"
    assert np.array_equal(found["loss"], ac.open(built)["loss"].compute(), equal_nan=True)
    assert ds.provenance.spec.outputs == ("entropy", "loss", f"topk={K}")
    assert f"topk={K}" in ds.facts()["also"]
    assert ac.verify(sealed, full=True).ok


def test_others_read_them(sealed: str):
    import zarr

    group = zarr.open_group(sealed, mode="r")
    for name in NAMES:
        assert np.array_equal(group[name][...], ac.open(sealed)[name].compute(), equal_nan=True)
    assert group["topk/logit"].metadata.dimension_names == ("token", "k")
    assert sorted(group["topk"].array_keys()) == ["log_normalizer", "logit", "token_id"]


def test_a_resumed_build_ends_in_the_same_bytes(asked: ac.Spec, sealed: str, tmp_path: Path):
    half = Path(shutil.copytree(sealed, tmp_path / "half"))
    for gone in ("zarr.json", ".actcache/receipts/000001.json", "topk/logit/c/1/0", "entropy/c/1"):
        (half / gone).unlink()
    assert ac.build(asked, half).manifest == ac.open(sealed).manifest


def test_pieces_of_a_sequence_give_what_the_whole_gives(
    asked: ac.Spec, sealed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A sequence whose logits are too large is taken in pieces; a piece's last token still has its successor."""
    monkeypatch.setattr(outputs, "LOGITS_AT_ONCE", 257 * 7)
    monkeypatch.setattr(outputs, "VALUES_AT_ONCE", 257 * 3)
    ac.build(asked, tmp_path / "ds")
    pieces, whole = ac.open(tmp_path / "ds"), ac.open(sealed)
    for name in NAMES:
        np.testing.assert_allclose(pieces[name].compute(), whole[name].compute(), rtol=1e-5, atol=1e-6)


logit_rows = st.lists(
    st.lists(st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 1e-40, 1.0, 1.5, 2.0]), min_size=6, max_size=6),
    min_size=1,
    max_size=5,
)


@given(logit_rows, st.integers(1, 6), st.sampled_from([1, 12, 1 << 20]))
def test_of_equal_logits_the_lower_id_comes_first(rows: list[list[float]], k: int, at_once: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "VALUES_AT_ONCE", at_once)
        check_ties(rows, k)


def check_ties(rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    values, places = outputs.largest(logits, k)
    want = [sorted(range(6), key=lambda place, row=row: (-row[place], place))[:k] for row in logits.tolist()]
    assert places.tolist() == want
    assert torch.equal(values, logits.gather(-1, torch.tensor(want)))


def test_entropy_at_its_ends():
    logits = torch.tensor([[0.0] * 8, [100.0] + [0.0] * 7, [0.0, 0.0] + [-torch.inf] * 6])
    found = outputs.measure(logits, torch.tensor([0, 0, -100]), ["entropy", "loss"], None)
    np.testing.assert_allclose(found["entropy"].numpy(), [np.log(8), 0, np.log(2)], atol=1e-6)
    assert torch.isnan(found["loss"]).tolist() == [False, False, True]


def test_a_16_bit_model_full_of_ties(tmp_path: Path, corpus: str):
    folder = save_gpt2(tmp_path / "model", dtype=torch.bfloat16)
    spec = ac.Spec(model=str(folder), corpus=(corpus,), sites="blocks.0.hook_resid_pre", outputs=("topk=257",))
    ac.build(spec, tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    logit, ids = ds["topk/logit"].compute(), ds["topk/token_id"].compute()
    assert (np.diff(logit, axis=1) == 0).any()
    assert (np.sort(ids, axis=1) == np.arange(257)).all()
    tied = np.diff(logit, axis=1) == 0
    assert (np.diff(ids, axis=1)[tied] > 0).all()
    exact = np.log(np.exp(logit.astype(float)).sum(axis=1))
    np.testing.assert_allclose(ds["topk/log_normalizer"].compute(), exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (("topk=258",), "topk=258 .* vocabulary of 257"),
        (("topk=0",), "outputs: .*'topk=0' is not one of"),
        (("topk",), "outputs: .*'topk' is not one of"),
        (("topk=2", "topk=3"), "two different K"),
        ("logits", "'logits' is not one of loss, entropy, topk=K"),
        ((3,), "outputs"),
    ],
)
def test_outputs_that_cannot_be(spec: ac.Spec, tmp_path: Path, outputs, says: str):
    with pytest.raises(ac.InvalidInput, match=says) as caught:
        ac.build(ac.Spec(model=spec.model, corpus=spec.corpus, outputs=outputs), tmp_path / "ds")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ds").exists()


def test_words_in_any_form_are_one_record():
    for words in ("topk=050 loss,entropy", ["loss", "entropy,topk=50"], ("topk=50", "topk=50", "entropy", "loss")):
        assert parse_outputs(words) == ("entropy", "loss", "topk=50")
    assert parse_outputs(()) == ()


@pytest.mark.parametrize(("bad", "name"), [(float("inf"), "entropy"), (float("nan"), "topk/log_normalizer")])
def test_logits_that_are_not_finite_stop_the_build(
    asked: ac.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, name: str
):
    right = ModelParts.logits

    def wrong(parts, state):
        logits = right(parts, state)
        logits[-1, 3] = bad
        return logits

    ac.build(asked.model_copy(update={"outputs": ()}), tmp_path / "studied")  # what a model is like is found but once
    monkeypatch.setattr(loaded, "prove", lambda *args: {})  # which would find it too
    monkeypatch.setattr(ModelParts, "logits", wrong)
    wanted = "entropy" if name == "entropy" else "topk=2"
    with pytest.raises(ac.OutOfRange, match=rf"{name}, token \d+: .*logits; try --compute-dtype float32"):
        ac.build(asked.model_copy(update={"outputs": (wanted,)}), tmp_path / "ds")
    with pytest.raises(ac.NotSealed):
        ac.open(tmp_path / "ds")


@pytest.mark.parametrize(
    "edit",
    [
        lambda a, m: m["topk/token_id"].update(data_type="int64"),
        lambda a, m: m["entropy"].update(shape=[3]),
        lambda a, m: a["arrays"].pop("topk/log_normalizer"),
        lambda a, m: a["arrays"].pop("topk/logit"),
        lambda a, m: m.update({"topk/logit": m["topk/log_normalizer"]}),
        lambda a, m: m.update({"topk/token_id": m["topk/log_normalizer"]}),
    ],
)
def test_a_strangers_outputs_that_do_not_fit_are_refused(sealed: str, edit):
    with pytest.raises(Corrupt, match=r"array '(topk|entropy)"):
        parse_root(change(sealed, edit), "root")


def test_the_command_line_takes_commas_and_repeats(model: Path, corpus: str, tmp_path: Path):
    from click.testing import CliRunner

    from actcache.clients.cli import main

    args = ["build", str(tmp_path / "ds"), "--model", str(model), "--corpus", corpus, "--max-tokens", "40"]
    done = CliRunner().invoke(main, [*args, "--with", "loss,entropy", "--with", "topk=3"])
    assert done.exit_code == 0, done.output
    assert ac.open(tmp_path / "ds").provenance.spec.outputs == ("entropy", "loss", "topk=3")
    failed = CliRunner().invoke(main, [*args, "--with", "perplexity"])
    assert failed.exit_code == 2
    assert "'perplexity' is not one of loss, entropy, topk=K" in failed.output
