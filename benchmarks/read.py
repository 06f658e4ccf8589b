"""Reading a whole site from files through Dask ÷ the codec alone ÷ other readers of the same store."""

from __future__ import annotations

from collections.abc import Iterator

import zarr

import actcache
from benchmarks import readers
from benchmarks.datasets import STORED, layout_of, wide
from benchmarks.material import THREADS, Material
from benchmarks.ratio import Result, alternate, compare, fastest, timed

TITLE = "read: a whole site from files, every value decoded, bytes/s"
GOALS = {
    "codec alone": 0.9,
    "da.from_zarr": 1.5,
    "da.from_zarr, a chunk a shard": 1.5,
    "tensorstore": 1.0,
    "zarr-python": None,
    "zarr-python with zarrs": None,
}
OURS, FLOAT32 = "Dask", "Dask, as float32"


def run(material: Material) -> Iterator[Result]:
    """Compare float32 and bfloat16."""
    print(
        f"  768 wide, 262,144 tokens, files in memory; {THREADS} threads on every side; tensorstore is the faster of two ways"
    )
    for dtype in ("float32", "bfloat16"):
        yield from _compare(material, dtype)


def _compare(material: Material, dtype: str) -> Iterator[Result]:
    folder = wide(material, dtype)
    layout = layout_of(folder, STORED)
    ds = actcache.open(folder)
    shards = range(layout.n_shards)
    opened = zarr.open_array(folder / STORED, mode="r")
    sides = {
        OURS: readers.through_dask(ds.site(STORED, "stored")),
        "codec alone": readers.codec_alone(layout, readers.mapped(folder), shards),
        "da.from_zarr": readers.through_dask(readers.from_zarr(opened, layout.rows, by_shard=False)),
        "da.from_zarr, a chunk a shard": readers.through_dask(readers.from_zarr(opened, layout.rows, by_shard=True)),
        "zarr-python": readers.zarr_by_shard(opened, shards),
    }
    optional = {
        "tensorstore, 4 shards at once": readers.tensorstore(folder / STORED, at_once=4),
        "tensorstore, one call": readers.tensorstore(folder / STORED, at_once=None),
        "zarr-python with zarrs": readers.zarrs(folder / STORED, shards) if dtype == "float32" else None,
    }
    if dtype == "bfloat16":
        sides[FLOAT32] = readers.through_dask(ds[STORED])
    sides |= {name: work for name, work in optional.items() if work is not None}
    times = alternate({name: timed(work) for name, work in sides.items()}, material.seconds)
    if any(name.startswith("tensorstore") for name in times):
        times["tensorstore"] = fastest(times, "tensorstore")
    gigabytes = layout.rows * layout.row_bytes / 1e9
    for peer, goal in GOALS.items():
        if peer in times:
            yield compare("read", f"{dtype} ÷ {peer}", times, OURS, peer, goal=goal, amount=gigabytes, unit="GB/s")
    if FLOAT32 in times:
        yield compare(
            "read", f"{dtype} as float32 ÷ codec alone", times, FLOAT32, "codec alone", amount=gigabytes, unit="GB/s"
        )
