"""Ways to read a whole array: through Dask, by the codec alone, and with other libraries. All of them decode every value."""

from __future__ import annotations

import importlib.util
import mmap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr
from crc32c import crc32c
from numcodecs import blosc

from actcache.schemas.array import ArrayLayout
from benchmarks.material import THREADS

Work = Callable[[], object]
Get = Callable[[str], bytes | memoryview]


def through_dask(array: da.Array, workers: int = THREADS) -> Work:
    """Compute every block of an array, and keep one value of each."""
    corners = array.map_blocks(_corner, chunks=tuple((1,) * len(sizes) for sizes in array.chunks), dtype=array.dtype)
    return lambda: corners.compute(scheduler="threads", num_workers=workers)


def _corner(block: np.ndarray) -> np.ndarray:
    return block[(slice(1),) * block.ndim].copy()


def codec_alone(layout: ArrayLayout, get: Get, shards: Iterable[int]) -> Work:
    """Get each object, check every crc32c and decompress into a fresh array: nothing can be left out."""
    wanted = list(shards)

    def work() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda shard: decode(layout, shard, get).shape, wanted))

    return work


def decode(layout: ArrayLayout, shard: int, get: Get) -> np.ndarray:
    """The rows of a shard by the shortest way there is: no copy but that of the decompression."""
    data = np.frombuffer(get(layout.shard_key(shard)), np.uint8)
    low, high = layout.shard_range(shard)
    padded = -(-(high - low) // layout.chunk_rows) * layout.chunk_rows
    out = np.empty((padded, *layout.row_shape), layout.numpy_dtype)
    index = data[-layout.index_bytes : -4].view("<u8").reshape(-1, 2).tolist()
    for first, (offset, length) in zip(range(0, padded, layout.chunk_rows), index, strict=False):
        decode_chunk(data[offset : offset + length], out[first : first + layout.chunk_rows])
    return out[: high - low]


def decode_chunk(data: np.ndarray, out: np.ndarray) -> None:
    """Check and decompress a chunk."""
    if crc32c(data[:-4]) != int.from_bytes(data[-4:].tobytes(), "little"):
        raise AssertionError("crc32c")
    blosc.decompress(data[:-4], out.view(f"u{out.dtype.itemsize}"))


def mapped(folder: Path) -> Get:
    """Files as they lie in the page cache, without a copy."""

    def get(key: str) -> memoryview:
        with open(folder / key, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    return get


def zarr_by_shard(array: Any, shards: Iterable[int]) -> Work:
    """zarr-python, a shard after the other; it decodes the chunks of one on threads."""
    rows, wanted = array.shards[0], list(shards)

    def work() -> None:
        for shard in wanted:
            array[shard * rows : (shard + 1) * rows]

    return work


def from_zarr(array: Any, rows: int, by_shard: bool) -> da.Array:
    """`da.from_zarr`, with a Dask chunk a chunk of the store, as it is by default, or a shard."""
    opened: da.Array = (
        da.from_zarr(array, chunks=(array.shards[0], *array.shape[1:])) if by_shard else da.from_zarr(array)
    )  # type: ignore[no-untyped-call]
    return opened[:rows]


def zarrs(folder: Path, shards: Iterable[int]) -> Work | None:
    """zarr-python with the codec pipeline of zarrs, where that is installed."""
    if importlib.util.find_spec("zarrs") is None:
        return None
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": THREADS}):
        return zarr_by_shard(zarr.open_array(folder, mode="r"), shards)


def tensorstore_array(folder: Path) -> Any | None:
    """An array opened with tensorstore, where that is installed."""
    if importlib.util.find_spec("tensorstore") is None:
        return None
    import tensorstore

    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "context": {"data_copy_concurrency": {"limit": THREADS}},
        }
    ).result()


def tensorstore(folder: Path, at_once: int | None) -> Work | None:
    """tensorstore, where it is installed: `at_once` shards under way, or all of the array in one call."""
    opened = tensorstore_array(folder)
    if opened is None:
        return None
    if at_once is None:
        return lambda: opened.read().result()
    rows = opened.chunk_layout.write_chunk.shape[0]

    def work() -> None:
        under_way: list[Any] = []
        for low in range(0, opened.shape[0], rows):
            if len(under_way) == at_once:
                under_way.pop(0).result()
            under_way.append(opened[low : min(low + rows, opened.shape[0])].read())
        for each in under_way:
            each.result()

    return work
