"""The shard writer ÷ zarr-python ÷ tensorstore, writing the same array with the same metadata to files in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

import actcache  # noqa: F401  (registers bfloat16 with zarr-python)
from actcache.cache.encoder import encode_shard
from actcache.cache.reader import ArrayReader
from actcache.cache.store import Store, open_store
from actcache.schemas.array import ArrayLayout
from benchmarks.material import THREADS, Material, default_cut, layout
from benchmarks.ratio import Result, alternate, compare, timed

TITLE = "writer: our shards ÷ other writers of the same array (sharding, blosc zstd 1 with shuffle, crc32c), bytes/s"
DTYPES = ("float32", "float16", "bfloat16")
GOALS = {"zarr-python": 1.6, "tensorstore": 1.0}
SHARDS = 4


def run(material: Material) -> Iterator[Result]:
    """Compare all three dtypes."""
    width = material.widths[1]
    print(
        f"  activations of {material.model_name}, six sites side by side: {width} wide; {SHARDS} shards of about 64 MiB"
    )
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="actcache-benchmarks-", dir=material.memory) as folder:
            yield from _compare(material, width, dtype, Path(folder))


def _compare(material: Material, width: int, dtype: str, folder: Path) -> Iterator[Result]:
    chunk, shard = default_cut(width, dtype)
    rows = material.activations(width, dtype, SHARDS * shard)
    array = layout(rows, chunk, shard)
    with ThreadPoolExecutor(THREADS) as pool:
        writers: dict[str, tuple[Store, Callable[[], object]]] = {}
        for name, make in (("actcache", _ours), ("zarr-python", _zarr), ("tensorstore", _tensorstore)):
            store = open_store(folder / name)
            store.put_new(array.metadata_key, json.dumps(array.document()).encode())
            work = make(store, array, rows, pool)
            if work is None:
                print(f"  {dtype} ÷ {name}: skipped, it is not installed")
            else:
                writers[name] = store, work
        times = alternate({name: _side(*writer, array) for name, writer in writers.items()}, material.seconds)
        for name, (store, work) in writers.items():
            work()
            if ArrayReader(store, array).read().tobytes() != rows.tobytes():
                raise AssertionError(f"{name} wrote other values")
    for peer, goal in GOALS.items():
        if peer in writers:
            yield compare(
                "writer",
                f"{dtype} ÷ {peer}",
                times,
                "actcache",
                peer,
                goal=goal,
                amount=rows.nbytes / 1e9,
                unit="GB/s",
            )


def _side(store: Store, work: Callable[[], object], array: ArrayLayout) -> Callable[[], float]:
    measure = timed(work)

    def side() -> float:
        shards = Path(store.location.path) / array.name / "c"
        seconds = measure()
        shutil.rmtree(shards)
        return seconds

    return side


def _ours(store: Store, array: ArrayLayout, rows: np.ndarray, pool: ThreadPoolExecutor) -> Callable[[], object]:
    def write() -> None:  # as a build does: a shard is stored while the next one is encoded
        with ThreadPoolExecutor(1) as background:
            storing: Future[bool] | None = None
            for index in range(array.n_shards):
                low, high = array.shard_range(index)
                shard = encode_shard(array, rows[low:high], pool)
                if storing is not None:
                    storing.result()
                storing = background.submit(store.put_new, array.shard_key(index), shard)
            if storing is not None:
                storing.result()

    return write


def _zarr(store: Store, array: ArrayLayout, rows: np.ndarray, pool: ThreadPoolExecutor) -> Callable[[], object]:
    opened = zarr.open_array(Path(store.location.path) / array.name, mode="r+")

    def write() -> None:
        opened[:] = rows

    return write


def _tensorstore(
    store: Store, array: ArrayLayout, rows: np.ndarray, pool: ThreadPoolExecutor
) -> Callable[[], object] | None:
    try:
        import tensorstore
    except ModuleNotFoundError:
        return None
    where = {"driver": "file", "path": str(Path(store.location.path) / array.name)}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True).result()
    return lambda: opened.write(rows).result()
