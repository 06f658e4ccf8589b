"""Datasets that released versions wrote, read by this one; torch is not needed, nor imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray

import actcache as ac
from tests.golden.describe import describe

GOLDEN = Path(__file__).parent / "golden"
DATASETS = sorted(path for path in GOLDEN.glob("*/*.zarr"))


def test_there_is_a_golden_dataset_of_what_is_new_in_format_1_1():
    assert [path.name for path in DATASETS if path.parent.name == "1.1"] == ["text.zarr"]


def test_there_are_golden_datasets_of_format_1_0():
    assert [path.name for path in DATASETS if path.parent.name == "1.0"] == [
        "bfloat16.zarr",
        "float16.zarr",
        "float32.zarr",
        "grown.zarr",
    ]


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_golden_dataset_reads_as_it_was_written(path: Path):
    ds = ac.open(path)
    expected = json.loads((path.parent / "expected.json").read_text(encoding="utf-8"))[path.stem]
    assert describe(ds) == expected
    assert ds.format == path.parent.name
    report = ac.verify(path, full=True)
    assert (report.problems, report.unexpected) == ([], [])
    assert ds.resid.shape == (3, ds.n_tokens, 16)
    assert ds.resid.compute().dtype == np.float32
    assert "golden-gpt2" in repr(ds)


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_others_read_it_too(path: Path):
    ds = ac.open(path)
    opened = xarray.open_zarr(path)
    for name in [*ds.sites, *ds.tokens]:
        want = ds.rows(name, 0, opened[name].shape[0])
        kvstore = {"driver": "file", "path": str(path / name)}
        theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        assert theirs.tobytes() == want.tobytes()
        assert opened[name].values.tobytes() == want.tobytes()
        assert ds.zarr[name][...].tobytes() == want.tobytes()


def test_statistics_norms_loss_and_lens_of_the_golden_float32():
    ds = ac.open(GOLDEN / "1.0" / "float32.zarr")
    rows = ds["blocks.1.hook_resid_post"].compute().astype(float)
    np.testing.assert_allclose(ds.statistics["blocks.1.hook_resid_post"]["variance"], rows.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(ds.norm["blocks.1.hook_resid_post"], np.linalg.norm(rows, axis=1), rtol=1e-6)
    np.testing.assert_allclose(ac.lens.logit(ds)["loss"][-1], np.nanmean(ds["loss"].compute()), rtol=1e-5)


def test_the_golden_dataset_that_grew_has_every_form():
    ds = ac.open(GOLDEN / "1.0" / "grown.zarr")
    assert len(ds.generations) == 2
    assert ds["module:transformer.h.0.mlp.act"].shape == (ds.n_tokens, 64)
    for site in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
        exact = ds[site].compute()
        for kind, bound in (("int8", 0.02), ("fp8", 0.06)):
            back = ds.site(site, dtype=kind).compute()
            assert 0 < np.linalg.norm(back - exact) <= bound * np.linalg.norm(exact)
            damage = ds.damage(site, kind)
            assert damage is not None
            assert damage.relative_error == pytest.approx(
                np.linalg.norm(back - exact) / np.linalg.norm(exact), rel=1e-3
            )
    loss, entropy = ds["loss"].compute(), ds["entropy"].compute()
    assert np.isnan(loss).sum() == ds.n_sequences
    assert np.isfinite(entropy).all()
    best = ds["topk/logit"].compute() - ds["topk/log_normalizer"].compute()[:, None]
    assert (best <= 0).all()
    assert (np.diff(best, axis=1) <= 0).all()


def test_none_of_this_needs_torch():
    code = (
        "import sys, actcache as ac\n"
        f"ds = ac.open({str(GOLDEN / '1.0' / 'float32.zarr')!r})\n"
        "ac.lens.logit(ds); ds.resid.sum().compute(); ac.verify(ds.url, full=True)\n"
        "some = ds.where(position__gt=0); some.resid.compute(); some.to_xarray(); ac.open([ds.url, ds.url]).at([1]).resid\n"
        "assert sum(len(batch['token']) for batch in some.batches('resid', size=7, shuffle=0)) == some.n_tokens\n"
        f"ds = ac.open({str(GOLDEN / '1.1' / 'text.zarr')!r})\n"
        "ds.tokenizer.strings(ds.tokens['token_id'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_selections_and_batches_of_a_golden_dataset(path: Path):
    ds = ac.open(path)
    site, kept = ds.sites[0], ds.tokens["position"] > 2
    some = ds.where(position__gt=2)
    whole = ds[site].compute()
    assert np.array_equal(some[site].compute(), whole[kept])
    assert np.array_equal(some.to_xarray()[site].values, whole[kept])
    assert np.array_equal(ds.at([3, 0, 3]).resid.compute(), ds.resid.compute()[:, [3, 0, 3]])
    batches = list(some.batches(site, size=5, shuffle=1, columns="position"))
    tokens = np.concatenate([batch["token"] for batch in batches])
    assert np.array_equal(np.sort(tokens), np.flatnonzero(kept))
    assert np.array_equal(np.concatenate([batch[site] for batch in batches]), whole[tokens])
    assert np.array_equal(ac.open([path, path]).sequence(-1)[site].compute(), ds.sequence(-1)[site].compute())


def test_the_golden_dataset_of_format_1_1_has_its_text():
    ds = ac.open(GOLDEN / "1.1" / "text.zarr")
    ids = ds.tokens["token_id"]
    assert ds.tokenizer.decode(ids) == "Grüße für 10 €: 🦜\n"
    assert ds.tokenizer.strings(ids[:4]) == ["G", "r", "\ufffd", "\ufffd"]
