"""Reading a whole site through Dask ÷ reading the same objects whole and decoding their chunks by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import dask
import google_crc32c
import numpy as np
import obstore
from numcodecs import blosc

import actcache
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import open_store
from actcache.clients.dataset import Dataset
from actcache.schemas.array import ArrayLayout
from benchmarks.material import SITES, THREADS, Material
from benchmarks.ratio import Result, alternate, compare, timed
from benchmarks.s3_server import copy_all, s3_url

TITLE = "read: whole sites through Dask, shard by shard ÷ bare reads and decoding of the same objects, bytes/s"
GOAL = 0.9
Get = Callable[[str], bytes | memoryview]


def run(material: Material) -> Iterator[Result]:
    """Compare on the local disk, then on S3."""
    local = actcache.open(material.sealed)
    print(
        f"  {local.raw_bytes / 1e6:.0f} MB float32, {len(SITES)} sites of 4 shards, each reduced to its largest value;"
    )
    print(f"  {THREADS} threads on both sides; the files are in the page cache")
    yield _compare(material, "local disk", local, lambda key: (material.sealed / key).read_bytes())
    with s3_url() as url:
        if url is None:
            return
        store = open_store(url)
        assert isinstance(store, RemoteStore)
        copy_all(material.sealed, store)
        yield _compare(
            material, "S3", actcache.open(url), lambda key: memoryview(obstore.get(store.objects, key).bytes())
        )


def _compare(material: Material, where: str, ds: Dataset, get: Get) -> Result:
    layouts = [ArrayLayout.parse(site, json.loads(bytes(get(f"{site}/zarr.json")))) for site in SITES]
    objects = [(layout, shard) for layout in layouts for shard in range(layout.n_shards)]
    largest = [ds.site(site, dtype="stored").max() for site in SITES]  # one pass over every value, on both sides

    def ours() -> float:
        return float(max(dask.compute(*largest, scheduler="threads", num_workers=THREADS)))

    def bare() -> float:
        with ThreadPoolExecutor(THREADS) as pool:
            return float(max(pool.map(lambda each: _decode(*each, get).max(), objects)))

    if ours() != bare():
        raise AssertionError("the two sides read different values")
    times = alternate({"Dask": timed(ours), "bare": timed(bare)}, material.seconds)
    return compare("read", where, times, "Dask", "bare", goal=GOAL, amount=ds.raw_bytes / 1e9, unit="GB/s")


def _decode(layout: ArrayLayout, shard: int, get: Get) -> np.ndarray:
    """A shard by the shortest way there is: no copy but that of the decompression, every crc32c checked."""
    data = np.frombuffer(get(layout.shard_key(shard)), np.uint8)
    low, high = layout.shard_range(shard)
    out = np.empty((high - low, *layout.row_shape), layout.numpy_dtype)
    index = data[-layout.index_bytes : -4].view("<u8").reshape(-1, 2).tolist()
    for first, (offset, length) in zip(range(0, len(out), layout.chunk_rows), index, strict=False):
        packed = data[offset : offset + length - 4]
        if google_crc32c.value(packed) != int.from_bytes(
            data[offset + length - 4 : offset + length].tobytes(), "little"
        ):
            raise AssertionError("crc32c")
        blosc.decompress(packed, out[first : first + layout.chunk_rows].view("u4"))
    return out
