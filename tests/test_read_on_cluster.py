"""Lazy arrays on a Dask cluster: workers read the store themselves, small graphs travel, credentials do not."""

from __future__ import annotations

import pickle
from pathlib import Path

import distributed
import numpy as np

import actcache as ac
from tests.dask_processes import dask_processes

SITE = "blocks.0.hook_resid_post"


def test_workers_read_s3_themselves_with_credentials_of_their_own(s3: str, spec: ac.Spec, tmp_path: Path):
    url = s3 + "read"
    ac.build(spec.model_copy(update={"sites": "resid", "block_tokens": 64}), url)
    ds = ac.open(url)
    some = ds.where(position__gt=3)
    listed = ds.at([5, 600, 5])
    with dask_processes(tmp_path, 2) as running, distributed.Client(scheduler_file=str(running.file)) as client:
        client.wait_for_workers(2, timeout=60)
        whole = ds[SITE].compute()
        lazies = [ds[SITE].sum(axis=0), some[SITE].std(), listed.resid, ds[SITE][70:75]]
        for lazy in lazies:
            assert b"writersecret" not in pickle.dumps(lazy)
        total, deviation, rows, few = client.gather(client.compute(lazies))
    np.testing.assert_allclose(total, whole.sum(axis=0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(deviation, whole[ds.tokens["position"] > 3].std(), rtol=1e-4)
    assert np.array_equal(rows, ds.resid.compute(scheduler="threads")[:, [5, 600, 5]])
    assert np.array_equal(few, whole[70:75])


def test_a_graph_does_not_grow_with_what_each_task_reads(built: str):
    ds = ac.open(built)
    array = ds[SITE]
    tasks = dict(array.__dask_graph__())
    assert len(tasks) == array.npartitions
    assert len(pickle.dumps(tasks)) < 3000 + 400 * len(tasks)
    masked = dict(ds.where(position__gt=3)[SITE].__dask_graph__())
    assert len(pickle.dumps(masked)) < 15_000 + 400 * len(masked), "the mask is in it once, not with every task"
