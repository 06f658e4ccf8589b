"""The dataset view: lazy, exact, small reads for small questions, and clear words for wrong ones."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st

import actcache as ac
from actcache.cache.statistics import Moments, measure, pack, unpack


def test_opening_and_naming_arrays_reads_the_root_alone(built: str, reads: list[tuple[str, int]], no_compute: None):
    ds = ac.open(built)
    arrays = [ds[site] for site in ds.sites] + [ds.resid, ds["loss"], ds["token_id"], ds[ds.sites[0]][5:7] * 2]
    assert repr(ds)
    assert ds._repr_html_()
    assert [key for key, _ in reads] == ["zarr.json"]
    assert arrays[0].shape == (ds.n_tokens, 32)
    assert ds.resid.shape == (4, ds.n_tokens, 32)
    assert {array.dtype for array in arrays[:-2]} == {np.dtype("float32")}


def test_that_check_of_laziness_can_fail(built: str, no_compute: None):
    with pytest.raises(AssertionError, match="computed"):
        ac.open(built).resid.compute()


def test_one_dask_chunk_a_shard(built: str):
    ds = ac.open(built)
    assert ds[ds.sites[0]].chunks[0][:-1] == (160,) * (ds.n_tokens // 160)


def test_a_slice_reads_only_its_chunks(spec: ac.Spec, tmp_path: Path, reads: list[tuple[str, int]]):
    ac.build(spec.model_copy(update={"block_tokens": 512, "chunk_tokens": 16, "sites": "resid"}), tmp_path / "ds")
    ds = ac.open(tmp_path / "ds")
    site = ds.sites[1]
    whole = (tmp_path / "ds" / site / "c/0/0").stat().st_size
    reads.clear()
    ds[site][40:44].compute()
    assert {key for key, _ in reads} == {f"{site}/c/0/0"}
    assert sum(size for _, size in reads) < whole / 4
    reads.clear()
    ds[site][100].compute()
    assert len(reads) == 1, "the shard's index is read once"


def test_every_way_of_indexing_agrees_with_numpy(built: str):
    ds = ac.open(built)
    lazy = ds[ds.sites[3]]
    whole = lazy.compute()
    mask = whole[:, 0] > 0
    for index in (
        np.s_[5:10], np.s_[::-1], np.s_[::-3], np.s_[700:3:-7], np.s_[-1], np.s_[3], np.s_[[1, 700, 3]], np.s_[:, 3],
        np.s_[10:300:7, ::2], np.s_[..., None], np.s_[mask], np.s_[5:5], np.s_[-5:], np.s_[:, [1, 5]], np.s_[200:100],
    ):  # fmt: skip
        assert np.array_equal(lazy[index].compute(), whole[index]), index
    assert np.isclose(lazy.mean().compute(), whole.mean())
    assert np.array_equal(ds.resid[2, 10:20].compute(), ds["blocks.1.hook_resid_post"][10:20].compute())


def test_tokens_and_their_owners(built: str, corpus: str):
    ds = ac.open(built)
    assert set(ds.tokens) == {
        "token_id", "position", "sequence", "document", "document_position", "special", "sequence_start", "document_row",
    }  # fmt: skip
    files = [path.read_text() for path in sorted(Path(corpus).parent.glob("*.txt"))]
    used = [index for index, text in enumerate(files) if text]  # an empty file is no document
    texts = [files[index] for index in used]
    start = ds.sequence_start
    assert (start[0], start[-1], len(start)) == (0, ds.n_tokens, ds.n_sequences + 1)
    assert np.diff(start).min() >= 1
    assert np.diff(start).max() == 32
    assert np.array_equal(ds.tokens["sequence"], np.repeat(np.arange(ds.n_sequences), np.diff(start)))
    assert np.array_equal(ds.tokens["position"], np.concatenate([np.arange(n) for n in np.diff(start)]))
    lengths = [len(text) for text in texts]  # a byte-level tokenizer without merges: a token a character
    assert np.array_equal(ds.tokens["document"], np.repeat(np.arange(len(texts)), lengths))
    assert np.array_equal(ds.tokens["document_position"], np.concatenate([np.arange(n) for n in lengths]))
    assert ds.tokens["document_row"].tolist() == [[i, 0] for i in used]
    assert (ds.n_documents, len(files)) == (11, 12)
    with pytest.raises(ValueError, match="read-only"):
        ds.tokens["token_id"][0] = 1
    with pytest.raises(ac.NotFound, match=r"there is .*token_id"):
        _ = ds.tokens["tokens"]


def test_norms_and_statistics_are_of_what_is_stored(built_by_dtype: dict[str, str]):
    for url in built_by_dtype.values():
        ds = ac.open(url)
        for site in ds.sites:
            rows = ds[site].compute().astype(np.float64)
            np.testing.assert_allclose(ds.norm[site], np.linalg.norm(rows, axis=1), rtol=1e-6)
            np.testing.assert_allclose(ds.statistics[site]["mean"], rows.mean(axis=0), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(ds.statistics[site]["variance"], rows.var(axis=0), rtol=1e-10)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 99), st.floats(-1e6, 1e6)
)
def test_merged_moments_are_those_of_the_whole(sizes: list[int], width: int, seed: int, offset: float):
    parts = [np.random.default_rng([seed, i]).normal(offset, 1, (size, width)) for i, size in enumerate(sizes)]
    total = Moments.empty(width)
    for part in parts:
        total = total.merge(measure(part)[0])
    whole = np.concatenate(parts)
    assert total.count == len(whole)
    if len(whole):
        np.testing.assert_allclose(total.mean, whole.mean(axis=0), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(total.variance, whole.var(axis=0), rtol=1e-6, atol=1e-9)
    (again,) = unpack(pack([total]), [width], total.count)
    assert np.array_equal(again.m2, total.m2)
    with pytest.raises(ValueError, match="values"):
        unpack(pack([total]), [width + 1], total.count)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensorstore_reads_every_array_bit_exact(built_by_dtype: dict[str, str], dtype: str):
    url = built_by_dtype[dtype]
    ds = ac.open(url)
    names = [path.parent.relative_to(url).as_posix() for path in Path(url).rglob("zarr.json")]
    arrays = [name for name in names if (Path(url) / name / "c").is_dir()]
    assert len(arrays) > 30
    for name in arrays:
        kvstore = {"driver": "file", "path": f"{url}/{name}"}
        theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        ours = ds.rows(name, 0, theirs.shape[0])
        assert theirs.dtype == ours.dtype
        assert theirs.tobytes() == ours.tobytes(), name
    assert ds.site(ds.sites[0], dtype="stored").dtype.name == dtype


OUTSIDER = """
import sys, zarr, xarray, numpy
url, expected = sys.argv[1:]
assert not any(name.startswith("actcache") for name in sys.modules)
group = zarr.open_group(url, mode="r")
data = xarray.open_zarr(url)
array = group["blocks.1.hook_resid_post"][...]
assert array.dtype == numpy.float16, array.dtype
assert numpy.array_equal(array, numpy.load(expected))
assert numpy.array_equal(data["blocks.1.hook_resid_post"].values, array)
assert data.sizes["d_model"] == 32 and not data.coords
assert group["statistics/blocks.1.hook_resid_post"].shape == (2, 32)
assert group["norm/0"].attrs["sites"][0] == "blocks.0.hook_resid_pre"
assert group["head"].attrs["operations"][0]["op"] == "layer_norm"
"""


def outsider(script: str, *arguments: str) -> tuple[int, str]:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, cwd="/", check=False
    )
    return done.returncode, done.stderr


def test_zarr_and_xarray_open_it_without_actcache(built_by_dtype: dict[str, str], tmp_path: Path):
    url = built_by_dtype["float16"]
    np.save(tmp_path / "x.npy", ac.open(url).site("blocks.1.hook_resid_post", "stored").compute())
    assert outsider(OUTSIDER, url, str(tmp_path / "x.npy")) == (0, "")


@pytest.mark.parametrize("call", ["zarr.open_group(url, mode='r')['blocks.0.hook_resid_pre']", "xarray.open_zarr(url)"])
def test_a_reader_without_bfloat16_fails_loudly(built_by_dtype: dict[str, str], call: str):
    code, error = outsider(f"import sys, zarr, xarray; url = sys.argv[1]; {call}", built_by_dtype["bfloat16"])
    assert code != 0
    assert "bfloat16" in error
    cured = f"import sys, zarr, xarray, actcache; url = sys.argv[1]; {call}"
    assert outsider(cured, built_by_dtype["bfloat16"]) == (0, "")


def test_the_group_and_xarray_see_every_array(built: str):
    ds = ac.open(built)
    assert isinstance(ds.zarr, zarr.Group)
    assert np.array_equal(ds.zarr["loss"][...], ds["loss"].compute(), equal_nan=True)
    opened = xarray.open_zarr(built)
    assert set(opened.data_vars) == {*ds.sites, *ds.tokens, "loss"}
    with pytest.raises(ValueError, match="read-only"):
        ds.zarr["loss"][0] = 1.0


def total(array: object) -> float:
    return float(array.sum().compute(scheduler="single-threaded"))  # type: ignore[attr-defined]


def test_graphs_travel_to_other_processes(built: str, s3: str, spec: ac.Spec):
    url = s3 + "travel"
    ac.build(spec.model_copy(update={"sites": "resid", "max_tokens": 200}), url)
    for where in (built, url):
        array = ac.open(where)["blocks.0.hook_resid_post"]
        assert b"writersecret" not in pickle.dumps(array)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            assert pool.submit(total, array).result(120) == total(array)


def test_names_of_lazy_arrays_are_stable_and_differ_by_content(built_by_dtype: dict[str, str]):
    first, again = ac.open(built_by_dtype["float32"]), ac.open(built_by_dtype["float32"])
    other = ac.open(built_by_dtype["bfloat16"])
    site = first.sites[0]
    assert first[site].name == again[site].name
    assert len({first[site].name, other[site].name, other.site(site, "stored").name, first[first.sites[1]].name}) == 4


def test_a_dataset_made_anew_at_the_same_url_is_not_read_with_old_eyes(spec: ac.Spec, tmp_path: Path):
    import shutil

    small = spec.model_copy(update={"sites": "resid", "max_tokens": 100})
    ac.build(small, tmp_path / "ds")
    before = ac.open(tmp_path / "ds").resid.compute()
    shutil.rmtree(tmp_path / "ds")
    ac.build(small.model_copy(update={"max_tokens": 90}), tmp_path / "ds")
    assert np.array_equal(ac.open(tmp_path / "ds").resid.compute(), before[:, :90])


def test_wrong_questions_get_clear_answers(built: str, tmp_path: Path):
    ds = ac.open(built)
    with pytest.raises(ac.NotFound, match=r"no array 'blocks\.9'"):
        ds["blocks.9"]
    with pytest.raises(ac.NotFound, match=r"no site 'loss'; there is blocks\.0"):
        ds.site("loss")
    with pytest.raises(ac.InvalidInput, match="stored"):
        ds.site(ds.sites[0], dtype="float64")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"rows 0:\d+ of"):
        ds.rows("token_id", 0, ds.n_tokens + 1)
    with pytest.raises(ac.NotFound, match="no dataset here"):
        ac.open(tmp_path / "absent")


def test_the_summary_tells_what_it_is_and_escapes(built: str):
    ds = ac.open(built)
    for word in (ds.url, "random-gpt2", "3 layers × 32", f"{ds.n_tokens:,}", "float32", ds.key):
        assert word in repr(ds)
        assert word in ds._repr_html_()
    from actcache.clients.summary import html_summary

    assert "<script>" not in html_summary({"a": "<script>alert(1)</script>"})


def test_the_provenance_tells_where_it_comes_from(built: str):
    provenance = ac.open(built).provenance
    assert provenance.replay.status == "replayed"
    assert len(provenance.replay.sequences) == 4
    (environment,) = provenance.environments
    contexts = {"padding", "batch", "causality"}
    assert set(environment["proof"]) == {"logits", "stream", "attention", "mlp", "final_norm", "head", *contexts}
    assert environment["sites"]["blocks.1.hook_mlp_out"] == "output of transformer.h.1.mlp"
    assert environment["libraries"]["torch"]
    assert (provenance.mixed_environments, provenance.mixed_attempts) == (False, ())
    assert provenance.labels.model == "random-gpt2"


def test_a_dataset_travels_and_iterates(built: str):
    ds = ac.open(built)
    again = pickle.loads(pickle.dumps(ds))
    assert (again.url, again.manifest) == (ds.url, ds.manifest)
    assert list(ds) == ds.sites
    assert ds.sites[0] in ds
    assert "loss" in ds
    assert "nothing" not in ds
