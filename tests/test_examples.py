"""The examples on a small dataset: what they say is so."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import actcache as ac
from tests.test_capturable import EXAMPLES, example

FIT_TOKENS = 2_000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model over the beginnings of some files of the standard library, 64 tokens each."""
    url = str(tmp_path_factory.mktemp("examples") / "small.zarr")
    corpus = tuple(map(str, sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))))
    spec = ac.Spec(
        model=str(EXAMPLES / "tiny-gpt"), corpus=corpus, context=64, long="truncate", min_tokens=64, outputs=("loss",)
    )
    ac.build(spec, url)
    return url


def tables(printed: str) -> dict[str, list[list[float]]]:
    """Numbers of each table that was printed, by its title: a row a line, without its label."""
    found: dict[str, list[list[float]]] = {}
    for part in printed.split("\n\n"):
        title, *lines = part.splitlines()
        found[title] = [[float(n) for n in re.findall(r"-?\d+\.\d+", line)] for line in lines[1:]]
    return found


def test_logit_and_tuned_lens(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module = example("logit_and_tuned_lens")
    found = module.main(small, tmp_path / "out", None, FIT_TOKENS)
    printed = capsys.readouterr().out
    ds = ac.open(small)
    fitted, held = ac.lens.states(ds).split(module.HELD_OUT, module.SEED)
    for name in ("logit", "ridge", "tuned"):
        assert found[name]["kl"][-1] == 0
        np.testing.assert_allclose(found[name]["loss"][-1], ds["loss"].compute()[held.token].mean(), rtol=1e-4)
    assert (found["tuned"]["kl"][:-1] < found["logit"]["kl"][:-1]).all()
    shown = np.array(tables(printed)["KL(final ‖ layer), nats"])
    np.testing.assert_allclose(shown[:, ::3].T, [found[n]["kl"] for n in ("logit", "ridge", "tuned")], atol=6e-4)
    low, high = found["tuned"].interval("kl")
    np.testing.assert_allclose(shown[:, 7:9], np.stack([low, high], axis=1), atol=6e-4)
    paired = np.array(tables(printed)["how much more KL(final ‖ layer), nats, paired"])
    np.testing.assert_allclose(paired[:, 0], found["logit"]["kl"] - found["tuned"]["kl"], atol=2e-3)
    counts = np.ones(fitted.vocabulary)
    np.add.at(counts, fitted.target, 1)
    unigram = -np.log(counts / counts.sum())[held.target].mean()
    assert f"next token alone: {unigram:.3f} nats" in printed
    assert (found["shuffled"]["loss"] > found["tuned"]["loss"] + 0.5).all()
    pictures = {"loss.png", "kl.png", "predictions-logit.png", "predictions-tuned.png", "tuned.lens"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures
    np.testing.assert_allclose(
        ac.lens.evaluate(ac.lens.load(tmp_path / "out/tuned.lens"), held)["kl"], found["tuned"]["kl"], rtol=1e-5
    )


def test_is_it_iterative(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module = example("is_it_iterative")
    found = module.main(small, tmp_path / "out", None, FIT_TOKENS)
    printed = capsys.readouterr().out
    penalty = found["transfer"]["penalty"]
    title = next(title for title in tables(printed) if title.startswith("loss more than by the layer's own"))
    shown = np.array([row for row in tables(printed)[title] if len(row) == 10])
    assert len(shown) == len(penalty) - 1
    np.testing.assert_allclose(shown[:, 0], found["shared"]["loss_difference"][:-1], atol=6e-4)
    np.testing.assert_allclose(shown[:, 3], found["none"]["loss_difference"][:-1], atol=6e-4)
    apart = np.ma.masked_array(penalty[:-1, :-1], np.eye(len(penalty) - 1, dtype=bool))
    np.testing.assert_allclose(shown[:, 6], apart.min(axis=0), atol=6e-4)
    np.testing.assert_allclose(shown[:, 9], apart.mean(axis=0), atol=6e-4)
    in_bits = np.array(tables(printed)["one shared translator, bits per byte more than own ones"])
    np.testing.assert_allclose(in_bits[:, 0], found["shared"]["loss_difference_bits_per_byte"][:-1], atol=6e-4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"transfer.png", "transfer.csv", "shared.png"}


def test_an_order_of_layers_is_found_where_there_is_one_and_not_where_there_is_none():
    ordered = example("is_it_iterative").ordered
    distance = np.abs(np.subtract.outer(np.arange(6), np.arange(6))).astype(float)
    along, share = ordered(distance)
    assert along == pytest.approx(1)
    assert share == pytest.approx(2 / 720, abs=3e-3)  # the order itself, and backwards
    random = np.random.default_rng(0)
    shares = [ordered(random.normal(size=(6, 6)))[1] for _ in range(10)]
    assert 0.25 < np.mean(shares) < 0.75


def test_mid_sequence_and_truncated(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module = example("mid_sequence_and_truncated")
    found = module.main(small, tmp_path, None, FIT_TOKENS, 30)
    printed = capsys.readouterr().out
    assert (
        found["replaced"]["kl"][:, 0] == 0
    ).all()  # before any attention only the position counts, and that is the same
    assert (found["truncated"]["kl"][:, 0] > 0).all()
    assert (found["replaced"]["kl"][:, 1:] > 0).all()

    ids = {way: torch.from_numpy(np.load(tmp_path / f"{way}.npy").astype(np.int64)) for way in module.WAYS}
    ds = ac.open(small)
    start, again = module.rows(ds, ac.lens.states(ds).split(module.HELD_OUT, module.SEED)[1], 30)
    assert all((again[way] == ids[way].numpy()).all() for way in module.WAYS)
    stored = torch.from_numpy(ds.tokens["token_id"][start[:, None] + np.arange(64)].astype(np.int64))
    assert (ids["truncated"] == stored[:, 32:]).all()
    assert (ids["replaced"][:, 32:] == stored[:, 32:]).all()
    assert (ids["replaced"][:, :32] != stored[:, :32]).any(dim=1).all()

    plain = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-gpt").eval()

    def loss(rows: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            logs = torch.log_softmax(plain(rows).logits[:, -32:-1], dim=-1)
        return -logs.gather(2, rows[:, -31:, None])[:, :, 0].numpy()

    ranges = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 8), slice(8, 16), slice(16, 31)]
    for way in module.WAYS:
        more = loss(ids[way]) - loss(stored)
        want = [more[:, each].mean() for each in ranges]
        np.testing.assert_allclose(found[way]["loss_difference"][:, -1], want, atol=1e-4)
        shown = np.array(tables(printed)[f"first half {way}: loss more than in mid-sequence, nats"])
        np.testing.assert_allclose(shown[:, -3], want, atol=6e-4)
    pictures = {f"{way}-{measure}.png" for way in module.WAYS for measure in ("loss_difference", "kl")}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures


def test_states_that_are_the_same_do_not_differ(small: str):
    module = example("mid_sequence_and_truncated")
    read = ac.lens.states(ac.open(small), max_tokens=300)
    assert not module.differences(ac.lens.identity(read), read, read).any()
