"""Several datasets as one: every accessor gives what concatenating theirs gives, and what does not agree is refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from tests.models import save_gpt2

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def urls(spec: ac.Spec, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three datasets of the same sites and different tokens; the last has another block size."""
    folder = tmp_path_factory.mktemp("joined")
    common = spec.model_copy(update={"sites": "resid"})
    specs = [
        common.model_copy(update={"max_tokens": 300}),
        common.model_copy(update={"context": 20}),
        common.model_copy(update={"block_tokens": 64, "max_tokens": 100}),
    ]
    for number, each in enumerate(specs):
        ac.build(each, folder / str(number))
    return [str(folder / str(number)) for number in range(len(specs))]


def test_all_of_it_is_what_concatenating_gives(urls: list[str]):
    parts, ds = [ac.open(url) for url in urls], ac.open(urls)
    assert ds.n_tokens == sum(part.n_tokens for part in parts)
    assert ds.sites == parts[0].sites
    for name in (SITE, "loss", "token_id", "position", "document_position", "special"):
        assert np.array_equal(
            ds[name].compute(), np.concatenate([part[name].compute() for part in parts]), equal_nan=True
        ), name
    assert np.array_equal(ds.resid.compute(), np.concatenate([part.resid.compute() for part in parts], axis=1))
    assert np.array_equal(ds.norm[SITE], np.concatenate([part.norm[SITE] for part in parts]))
    whole = ds[SITE].compute().astype(np.float64)
    np.testing.assert_allclose(ds.statistics[SITE]["mean"], whole.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ds.statistics[SITE]["variance"], whole.var(axis=0), rtol=1e-10)
    assert ds.n_sequences == len(ds.sequence_start) - 1
    assert np.array_equal(ds.tokens["sequence"], np.repeat(np.arange(ds.n_sequences), np.diff(ds.sequence_start)))
    assert ds.tokens["document"].max() + 1 == ds.n_documents
    for word in ("3:", urls[0], f"{ds.n_tokens:,}"):
        assert word in repr(ds)
        assert word in ds._repr_html_()


def test_what_is_not_along_the_token_axis_is_left_to_the_parts(urls: list[str]):
    ds = ac.open(urls)
    for name in ("sequence_start", "document_row", "head/unembedding", f"statistics/{SITE}"):
        with pytest.raises(ac.NotFound, match=r"ask one of ds\.parts"):
            ds[name]
    with pytest.raises(ac.NotFound, match=r"ds\.norm has them by site"):
        ds["norm/0"]
    assert len(ds.sequence_start) == ds.n_sequences + 1
    assert ds.statistics[SITE]["mean"].shape == (ds.d_model,)


def test_selections_cross_the_borders(urls: list[str]):
    parts, ds = [ac.open(url) for url in urls], ac.open(urls)
    whole = ds[SITE].compute()
    border = parts[0].n_tokens
    assert np.array_equal(ds[SITE][border - 3 : border + 3].compute(), whole[border - 3 : border + 3])
    picked = [ds.n_tokens - 1, border, border - 1, 0, border]
    assert np.array_equal(ds.at(picked)[SITE].compute(), whole[picked])
    assert np.array_equal(ds.where(position=1)[SITE].compute(), whole[ds.tokens["position"] == 1])
    mine = parts[0].n_documents
    assert ds.document(mine).text == parts[1].document(0).text
    assert np.array_equal(ds.document(mine)[SITE].compute(), parts[1].document(0)[SITE].compute())
    assert np.array_equal(ds.sequence(-1)[SITE].compute(), parts[2].sequence(-1)[SITE].compute())
    assert np.array_equal(ds.to_xarray()[SITE].values, whole)
    assert ds.where(norm__lt=float(np.median(ds.norm[SITE])), site=SITE).n_tokens == ds.n_tokens // 2
    lens, alone = ac.lens.logit(ds)["loss"], [ac.lens.logit(part)["loss"] for part in parts]
    assert lens.shape == alone[0].shape
    assert min(map(min, alone)) <= lens[0] <= max(map(max, alone))


def test_it_travels(urls: list[str]):
    ds = ac.open(tuple(urls))
    again = pickle.loads(pickle.dumps(ds))
    assert np.array_equal(again.at([5, 400])[SITE].compute(), ds.at([5, 400])[SITE].compute())
    assert again[SITE].name == ds[SITE].name


def test_what_does_not_agree_is_named(urls: list[str], spec: ac.Spec, corpus: str, tmp_path: Path):
    small = spec.model_copy(update={"sites": "resid", "max_tokens": 50, "outputs": ()})
    others = {
        "their models differ: other-gpt2": {"model": str(save_gpt2(tmp_path / "other-gpt2", seed=1))},
        "their sites differ: .*hook_resid_pre.* in the first alone and nothing in the second": {"sites": SITE},
        "they are stored in different dtypes: float32 and float16": {"dtype": "float16"},
    }
    for number, (said, change) in enumerate(others.items()):
        ac.build(small.model_copy(update=change), tmp_path / str(number))
        pair = [str(tmp_path / str(number)), urls[0]] if "models" in said else [urls[0], str(tmp_path / str(number))]
        with pytest.raises(ac.InvalidInput, match=f"cannot be one dataset: {said}"):
            ac.open(pair)
    with pytest.raises(ac.InvalidInput, match="at least one URL"):
        ac.open([])
    with pytest.raises(ac.NotFound, match="no array 'entropy'"):
        ac.open(urls)["entropy"]
    ac.build(small, tmp_path / "no loss")
    with pytest.raises(ac.NotFound, match="no array 'loss'"):
        ac.open([urls[0], str(tmp_path / "no loss")])["loss"]
    assert "loss" not in ac.open([urls[0], str(tmp_path / "no loss")]).fields
