"""Reading a whole site from S3 through Dask ÷ bare GETs of the same objects ÷ other readers of the same store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import obstore
import zarr

import actcache
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import open_store
from actcache.schemas.root import ROOT_KEY
from benchmarks import readers
from benchmarks.datasets import STORED, copy, layout_of, wide
from benchmarks.material import THREADS, Material
from benchmarks.ratio import Result, alternate, compare, fastest, timed
from benchmarks.s3_server import fsspec_store, s3_url

TITLE = "read_s3: a whole site from S3, every value decoded, bytes/s"
GETS_AT_ONCE = (2, 4, 8)
OBJECTS = 4
PARTS: dict[str, int | None] = {"whole objects": None, "parts of 4 MiB": 4 << 20, "parts of 16 MiB": 16 << 20}
"""Other ways of fetching than ours, which asks for parts of 8 MiB."""
OURS, GET = "Dask", "bare GET"
GOALS = {
    GET: 0.9,
    "zarr-python over s3fs": 2.5,
    "da.from_zarr over s3fs": 4.0,
    "da.from_zarr over s3fs, a chunk a shard": None,
}


def run(material: Material) -> Iterator[Result]:
    """Compare float32 and bfloat16."""
    with s3_url() as url:
        if url is None:
            return
        print(
            f"  768 wide, the site's first {OBJECTS} shards; bare GETs decode nothing, and are the fastest of "
            f"{', '.join(map(str, GETS_AT_ONCE))} at once; the server shares the {THREADS} cores with every side"
        )
        for dtype in ("float32", "bfloat16"):
            yield from _compare(material, f"{url}/{dtype}", dtype)


def _compare(material: Material, url: str, dtype: str) -> Iterator[Result]:
    folder = wide(material, dtype)
    layout = layout_of(folder, STORED)
    store = open_store(url)
    assert isinstance(store, RemoteStore)
    keys = [layout.shard_key(shard) for shard in range(OBJECTS)]
    size = copy(folder, store, [ROOT_KEY, layout.metadata_key, *keys])
    rows = OBJECTS * layout.shard_rows
    with fsspec_store(url) as names:
        opened = zarr.open_array(names, path=STORED, mode="r")
        ours = readers.through_dask(actcache.open(url).site(STORED, "stored")[:rows])
        sides = {
            OURS: ours,
            "zarr-python over s3fs": readers.zarr_by_shard(opened, range(OBJECTS)),
            "da.from_zarr over s3fs": readers.through_dask(readers.from_zarr(opened, rows, by_shard=False)),
            "da.from_zarr over s3fs, a chunk a shard": readers.through_dask(
                readers.from_zarr(opened, rows, by_shard=True)
            ),
        }
        sides |= {f"{OURS}, {name}": _in_parts(ours, size) for name, size in PARTS.items()}
        sides |= {f"{GET}, {many} at once": _gets(store, keys, many) for many in GETS_AT_ONCE}
        times = alternate({name: timed(work) for name, work in sides.items()}, material.seconds)
    times[GET] = fastest(times, GET)
    figures: dict[str, Any] = {"amount": size / 1e6, "unit": "MB/s compressed"}
    for peer, goal in GOALS.items():
        yield compare("read_s3", f"{dtype} ÷ {peer}", times, OURS, peer, goal=goal, **figures)
    for name in PARTS:
        yield compare("read_s3", f"{dtype}, {name} ÷ {GET}", times, f"{OURS}, {name}", GET, **figures)


def _in_parts(work: readers.Work, size: int | None) -> readers.Work:
    def patched() -> None:
        with patch.object(RemoteStore, "part_bytes", size):
            work()

    return patched


def _gets(store: RemoteStore, keys: list[str], many: int) -> Callable[[], object]:
    def work() -> None:
        with ThreadPoolExecutor(many) as pool:
            list(pool.map(lambda key: len(obstore.get(store.objects, key).bytes()), keys))

    return work
