"""Selections: whatever is asked for, the answer is numpy's on the whole array, and no more is read than it needs."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.local_store import LocalStore
from actcache.clients.token_index import PAGE, Listed, Masked, Span, TokenIndex

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def ds(built: str) -> ac.Dataset:
    return ac.open(built)


@pytest.fixture(scope="module")
def whole(ds: ac.Dataset) -> np.ndarray:
    return ds[SITE].compute()


def expected(ds: ac.Dataset, name: str) -> np.ndarray:
    return ds.norm[SITE] if name == "norm" else ds["loss"].compute() if name == "loss" else ds.tokens[name]


OPERATORS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


@given(data=st.data())
def test_a_condition_keeps_what_numpy_keeps(built: str, data: st.DataObject):
    ds = ac.open(built)
    asked, kept = {}, np.ones(ds.n_tokens, bool)
    fields = ["position", "document", "sequence", "token_id", "loss", "norm"]
    for name in data.draw(st.lists(st.sampled_from(fields), max_size=3, unique=True)):
        values = expected(ds, name)
        if data.draw(st.booleans()) and name not in ("loss", "norm"):
            some = data.draw(st.lists(st.sampled_from(sorted(set(values.tolist()))), max_size=5))
            asked[data.draw(st.sampled_from([name, f"{name}__in"]))] = some
            kept &= np.isin(values, some)
        else:
            how = data.draw(st.sampled_from(sorted(OPERATORS)))
            value = values[data.draw(st.integers(0, len(values) - 1))].item()
            asked[name if how == "eq" and data.draw(st.booleans()) else f"{name}__{how}"] = value
            kept &= OPERATORS[how](values, value)
    site = SITE if any(key.split("__")[0] == "norm" for key in asked) else None
    found = ds.where(site=site, **asked)
    assert found.n_tokens == kept.sum()
    assert np.array_equal(found.index.tokens(0, found.n_tokens), np.flatnonzero(kept))
    assert np.array_equal(found[SITE].compute(), ds[SITE].compute()[kept])
    assert np.array_equal(found.tokens["token_id"], ds.tokens["token_id"][kept])
    assert np.array_equal(found.norm[SITE], ds.norm[SITE][kept])


@given(data=st.data())
def test_selections_compose(built: str, data: st.DataObject):
    """A chain of where, masks and at is the same chain of numpy's indexing."""
    ds = ac.open(built)
    view, tokens = ds, np.arange(ds.n_tokens)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["where", "mask", "dask mask", "at"]))
        if kind == "where":
            low = data.draw(st.integers(0, 40))
            view, tokens = view.where(position__ge=low), tokens[ds.tokens["position"][tokens] >= low]
        elif kind == "at":
            picked = data.draw(st.lists(st.integers(0, max(0, len(tokens) - 1)), max_size=20)) if len(tokens) else []
            view, tokens = view.at(picked), tokens[np.array(picked, np.int64)]
        else:
            mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(len(tokens)) < 0.6
            view = view.where(da.from_array(mask, chunks=17) if kind == "dask mask" and len(mask) else mask)
            tokens = tokens[mask]
    assert np.array_equal(view.index.tokens(0, view.n_tokens), tokens)
    assert np.array_equal(view[SITE].compute(), ds[SITE].compute()[tokens])
    assert np.array_equal(view.tokens["document"], ds.tokens["document"][tokens])
    rows = view.rows(SITE, 0, view.n_tokens)
    assert np.array_equal(rows, view.site(SITE, "stored").compute())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_and_form_is_selected_exactly(built_by_dtype: dict[str, str], dtype: str):
    ds = ac.open(built_by_dtype[dtype])
    tokens = [700, 3, 3, 159, 160, 0]
    for view in (ds.at(tokens), ds.where(position__in=[1, 5, 30]), ds.sequence(3), ds.document(2)):
        at = view.index.tokens(0, view.n_tokens)
        for name in ds.sites[:2]:
            stored = ds.site(name, "stored").compute()
            assert np.array_equal(view.site(name, "stored").compute(), stored[at])
            assert np.array_equal(view[name].compute(), stored[at].astype(np.float32))
            assert view[name].dtype == np.float32
        assert np.array_equal(view.resid.compute(), ds.resid.compute()[:, at])


def test_quantised_forms_are_selected_too(spec: ac.Spec, tmp_path: Path):
    ac.build(spec.model_copy(update={"quantize": ("int8",), "sites": "resid"}), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    whole = ds.site(SITE, "int8").compute()
    assert np.array_equal(ds.at([5, 400, 5]).site(SITE, "int8").compute(), whole[[5, 400, 5]])
    assert np.array_equal(ds.where(position=3).rows(SITE, 0, 4, "int8"), whole[ds.tokens["position"] == 3][:4])


def test_selections_by_layer_restrict_sites_and_resid(ds: ac.Dataset):
    some = ds.where(layer=[0, 2], position__gt=3)
    assert some.sites == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    kept = ds.tokens["position"] > 3
    assert np.array_equal(some.resid.compute(), ds.resid.compute()[[0, 2]][:, kept])
    assert ds.where(layer__gt=0).where(layer__lt=2).sites == ["blocks.0.hook_resid_post"]
    assert ds.where(layer=1).resid.shape == (1, ds.n_tokens, 32)
    with pytest.raises(ac.InvalidInput, match="there is 0 to 3"):
        ds.where(layer=9)
    with pytest.raises(ac.NotFound, match="no site"):
        some["blocks.0.hook_attn_out"]


def test_special_tokens_by_flag(spec: ac.Spec, tmp_path: Path):
    ac.build(
        spec.model_copy(update={"sites": "resid", "bos": "always", "bos_id": 5, "max_tokens": 300}), tmp_path / "ds"
    )
    ds = ac.open(tmp_path / "ds")
    flags = ds.tokens["special"]
    assert 0 < (flags > 0).sum() < len(flags)
    for asked, kept in (({"special": False}, flags == 0), ({"special": True}, flags > 0), ({"special": "bos"}, flags & 1 > 0),
                        ({"special": "eos"}, flags & 2 > 0), ({"special__ne": "bos"}, flags & 1 == 0)):  # fmt: skip
        assert np.array_equal(ds.where(**asked).index.tokens(0, ds.where(**asked).n_tokens), np.flatnonzero(kept)), (
            asked
        )


def test_no_accessor_computes_and_where_reads_nothing(built: str, reads: list[tuple[str, int]], no_compute: None):
    ds = ac.open(built)
    reads.clear()
    some = ds.where(position__gt=3, norm__lt=500, site=SITE, special=False)
    more = some.where(layer=2)
    listed = ds.at([3, 1])
    repr(some), repr(more), listed[SITE], listed.resid, ds.sequence(1), ds.document(1)
    assert [key for key, _ in reads] == ["sequence_start/c/0"], "a sequence's place is read, and nothing else"
    for view in (some, more, ds.sequence(1), ds.document(2), listed):
        view.resid, view[SITE], view.to_xarray(), view.site(SITE, chunks=7)
    assert not any(key.startswith("blocks.") for key, _ in reads), "finding the tokens reads no activations"


def test_a_selection_reads_only_the_chunks_it_needs(spec: ac.Spec, tmp_path: Path, reads: list[tuple[str, int]]):
    ac.build(spec.model_copy(update={"block_tokens": 512, "chunk_tokens": 16, "sites": "resid"}), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    reads.clear()
    size = (tmp_path / "ds" / SITE / "c/0/0").stat().st_size
    found = ds.at([5, 200, 7, 201, 480])[SITE].compute()
    assert len(reads) == 4, "the shard's index, and the three chunks"
    assert sum(length for _, length in reads) < size / 4
    reads.clear()
    assert np.array_equal(ds.at([5, 200, 7, 201, 480])[SITE][1:3].compute(), found[1:3])
    assert len(reads) == 2, "a slice of a selection reads its chunks alone, and the index is known"


def test_sequences_and_documents(ds: ac.Dataset, whole: np.ndarray, corpus: str):
    start = ds.sequence_start
    for i in (0, 3, -1):
        low, high = start[i % ds.n_sequences], start[i % ds.n_sequences + 1]
        assert np.array_equal(ds.sequence(i)[SITE].compute(), whole[low:high])
    texts = [path.read_text() for path in sorted(Path(corpus).parent.glob("*.txt")) if path.read_text()]
    for i, text in enumerate(texts):
        view = ds.document(i)
        assert np.array_equal(view.index.tokens(0, view.n_tokens), np.flatnonzero(ds.tokens["document"] == i))
        assert view.text == text
        assert "".join(view.strings) == text
        assert len(view.strings) == view.n_tokens
    for wrong in (lambda: ds.sequence(ds.n_sequences), lambda: ds.document(-ds.n_documents - 1)):
        with pytest.raises(IndexError, match=r"(sequence|document) -?\d+ of \d+"):
            wrong()


def test_the_text_of_a_document_has_no_token_twice_where_sequences_overlap(spec: ac.Spec, corpus: str, tmp_path: Path):
    ac.build(
        spec.model_copy(update={"sites": "resid", "long": "stride", "stride": 20, "bos": "always", "bos_id": 97}),
        tmp_path / "ds",
    )
    ds = ac.open(tmp_path / "ds")
    texts = [path.read_text() for path in sorted(Path(corpus).parent.glob("*.txt")) if path.read_text()]
    long = max(range(len(texts)), key=lambda i: len(texts[i]))
    assert ds.document(long).n_tokens > len(texts[long]) + 32, "this one overlaps"
    plain = ds.document(long).where(special=False)
    ids = plain.tokens["document_position"]
    assert len(set(ids.tolist())) == len(texts[long])
    assert [ds.document(i).text for i in range(len(texts))] == texts


def test_sequences_of_one_length_are_a_cube(ds: ac.Dataset, whole: np.ndarray):
    with pytest.raises(ac.InvalidInput, match=r"sequences have \d+ to 32 tokens; .*length=32"):
        ds.sequences(SITE)
    cube = ds.sequences(SITE, length=32)
    starts = ds.sequence_start[:-1][np.diff(ds.sequence_start) == 32]
    assert cube.shape == (len(starts), 32, 32)
    assert np.array_equal(cube.compute(), np.stack([whole[at : at + 32] for at in starts]))
    assert np.array_equal(cube[2, 5].compute(), whole[starts[2] + 5])
    with pytest.raises(ac.InvalidInput, match="no sequence has 31337 tokens"):
        ds.sequences(SITE, length=31337)


def test_xarray_has_coordinates_and_is_lazy(built: str, no_compute: None, monkeypatch: pytest.MonkeyPatch):
    ds = ac.open(built)
    monkeypatch.setattr(LocalStore, "get", None)
    opened = ds.to_xarray()
    repr(opened)
    assert dict(opened.sizes) == {"token": ds.n_tokens, "d_model": 32, "layer": 4, "site": len(ds.sites)}
    assert {
        "token_id",
        "position",
        "sequence",
        "document",
        "document_position",
        "special",
        "layer",
        "state",
        "site",
    } == set(opened.coords)
    assert all(variable.chunks is not None for variable in opened.data_vars.values())


def test_a_mask_may_be_computed_from_other_selections(ds: ac.Dataset):
    def mask() -> np.ndarray:
        return np.arange(ds.n_tokens) < ds.where(position=0).n_tokens

    lazy = da.from_delayed(dask.delayed(mask)(), (ds.n_tokens,), bool)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(ds.where(lazy).n_tokens), daemon=True)
    asking.start()
    asking.join(60)
    assert found == [ds.n_sequences]


def test_a_mask_may_be_of_any_library(ds: ac.Dataset):
    pd, torch = pytest.importorskip("pandas"), pytest.importorskip("torch")
    mask = ds.tokens["position"] > 3
    for other in (mask.tolist(), pd.Series(mask), torch.from_numpy(mask.copy()), da.from_array(mask, chunks=50)):
        assert ds.where(other).n_tokens == mask.sum()


def test_patterns_of_batches_choose_among_the_sites_of_the_layers_asked_for(ds: ac.Dataset):
    (batch,) = ds.batches("resid", ds.n_tokens, where={"layer": [0, 2]})
    assert list(batch) == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "token"]


def test_xarray_travels_unread(ds: ac.Dataset):
    for view in (ds, ds.where(document=2)):
        opened = pickle.loads(pickle.dumps(view.to_xarray()))
        assert np.array_equal(opened["token_id"].values, view.tokens["token_id"])
        assert np.array_equal(opened[SITE].values, view[SITE].compute())


def test_xarray_selects_by_coordinates(ds: ac.Dataset, whole: np.ndarray):
    opened = ds.where(document=2).to_xarray()
    tokens = np.flatnonzero(ds.tokens["document"] == 2)
    assert np.array_equal(opened["token"], tokens)
    assert np.array_equal(opened[SITE].values, whole[tokens])
    assert np.array_equal(opened["resid"].sel(layer=2).values, whole[tokens])
    assert np.array_equal(opened["norm"].sel(site=SITE).values, ds.norm[SITE][tokens])
    assert (
        float(opened[SITE].where(opened.position == 0, drop=True).max())
        == whole[tokens][ds.tokens["position"][tokens] == 0].max()
    )


def test_torch_tensors_are_exact(built_by_dtype: dict[str, str]):
    import torch

    for dtype, url in built_by_dtype.items():
        ds = ac.open(url)
        stored = ds.where(position=2).to_torch(SITE, "stored")
        assert stored.dtype == getattr(torch, dtype)
        assert np.array_equal(stored.float().numpy(), ds.where(position=2)[SITE].compute())
        assert ds.to_torch(SITE).shape == (ds.n_tokens, 32)


def test_dask_chunks_as_asked_for(ds: ac.Dataset, whole: np.ndarray):
    assert ds.site(SITE, chunks=100).chunks[0][:2] == (100, 100)
    assert np.array_equal(ds.site(SITE, chunks=100).compute(), whole)
    assert ds.where(position=0)[SITE].chunks[0] != (0,)
    for wrong in (0, -1, 2.5, "auto"):
        with pytest.raises(ac.InvalidInput, match="number of tokens of a Dask chunk"):
            ds.site(SITE, chunks=wrong)  # type: ignore[arg-type]


def test_empty_selections_are_empty_everywhere(ds: ac.Dataset):
    for view in (ds.where(position__lt=0), ds.at([]), ds.where(np.zeros(ds.n_tokens, bool))):
        assert view.n_tokens == 0
        assert view[SITE].compute().shape == (0, 32)
        assert view.resid.compute().shape == (4, 0, 32)
        assert view.tokens["token_id"].shape == (0,)
        assert view.to_xarray().sizes["token"] == 0


def total(array: object) -> float:
    return float(array.sum().compute(scheduler="single-threaded"))  # type: ignore[attr-defined]


def test_selections_travel_and_have_stable_names(built: str):
    ds, again = ac.open(built), ac.open(built)
    names = {
        ds[SITE].name,
        ds.where(position=1)[SITE].name,
        ds.where(position=2)[SITE].name,
        ds.at([1, 2])[SITE].name,
        ds.at([2, 1])[SITE].name,
        ds.sequence(1)[SITE].name,
        ds.where(position=1).site(SITE, "stored").name,
    }
    assert len(names) == 6, "only a float32 site as stored and as float32 is the same"
    assert ds.where(position=1)[SITE].name == again.where(position=1)[SITE].name
    array = ds.where(position=1)[SITE]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(total, array).result(120) == total(array)
    view = pickle.loads(pickle.dumps(ds.where(position=1, layer=2)))
    assert np.array_equal(view.resid.compute(), ds.where(position=1, layer=2).resid.compute())


def test_wrong_questions_get_clear_answers(ds: ac.Dataset):
    for asked, said in (
        ({"positoin": 1}, r"no field 'positoin'; did you mean 'position'\?"),
        ({"position__above": 1}, "no operator 'above'; there is eq, ne"),
        ({"position": "first"}, "a number or a list of numbers"),
        ({"position__lt": [1, 2]}, "'lt' compares with one number"),
        ({"position__in": 3}, "'in' asks for a list"),
        ({"special": 3}, "special is True, False, 'bos' or 'eos'"),
        ({"norm__lt": 500}, "say at which site"),
        ({"position": 1, "site": SITE}, "goes with a condition on the norm"),
    ):
        with pytest.raises(ac.InvalidInput, match=said):
            ds.where(**asked)
    with pytest.raises(ac.NotFound, match="no site 'blocks'"):
        ds.where(norm__lt=3, site="blocks")
    with pytest.raises(ac.InvalidInput, match="one boolean a token"):
        ds.where(np.ones(ds.n_tokens))
    with pytest.raises(ac.InvalidInput, match=r"5 values for the [\d,]+ tokens"):
        _ = ds.where(np.ones(5, bool)).n_tokens
    for wrong in ([-1], [ds.n_tokens]):
        with pytest.raises(IndexError, match="of"):
            ds.at(wrong)
    with pytest.raises(ac.InvalidInput, match="whole numbers"):
        ds.at([0.5])
    with pytest.raises(ac.NotFound, match="not along the token axis"):
        ds.where(position=1)["sequence_start"]
    every = da.from_array(np.ones(50, bool), chunks=10)
    with pytest.raises(ac.InvalidInput, match="compute_chunk_sizes"):
        _ = ds.where(every[every]).n_tokens


def test_a_view_iterates_over_its_sites_and_knows_its_arrays(ds: ac.Dataset):
    for view in (ds, ds.where(position=1), ac.open([ds.url, ds.url])):
        assert list(view) == ds.sites
        assert SITE in view
        assert "token_id" in view
        assert "nothing" not in view


@given(
    n=st.integers(1, 3 * PAGE) | st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]),
    beyond=st.sampled_from([0, 1, PAGE, 2 * PAGE]),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    data=st.data(),
)
def test_token_indexes_count_and_cut_as_numpy_does(n: int, beyond: int, seed: int, share: float, data: st.DataObject):
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.random(n) < share)
    bits = Masked.empty(n)
    for part in np.array_split(kept, 3):
        Masked.mark(bits, part)
    low = data.draw(st.integers(0, n))
    listed = rng.permutation(np.concatenate([kept, kept[:7]]))
    cases: list[tuple[TokenIndex, np.ndarray]] = [
        (Masked(bits), kept),
        (Span(low, n), np.arange(low, n)),
        (Listed(listed), listed),
    ]
    cuts = np.unique([0, n, *(data.draw(st.integers(0, n)) for _ in range(3)), n + beyond])
    for index, tokens in cases:
        assert len(index) == len(tokens)
        assert index.end > tokens.max(initial=-1)
        a, b = sorted(data.draw(st.integers(0, len(tokens))) for _ in range(2))
        assert np.array_equal(index.tokens(a, b), tokens[a:b])
        some = rng.integers(0, len(tokens), 9) if len(tokens) else np.empty(0, np.int64)
        assert np.array_equal(index.at(some), tokens[some])
        start, stop = sorted(data.draw(st.integers(0, n)) for _ in range(2))
        inside = np.sort(tokens[(tokens >= start) & (tokens < stop)])
        assert np.array_equal(index.within(start, stop), inside)
        assert np.array_equal(
            index.counts(cuts), np.histogram(tokens, [*cuts[:-1], cuts[-1] + 1])[0] if len(cuts) > 1 else []
        )
