"""Random tokens of one site: a single one ÷ a bare range request and its decoding, and 10,000 at once ÷ other readers."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import zarr

import actcache
from actcache.cache.remote_store import RemoteStore
from actcache.cache.shards import decode_index
from actcache.cache.store import Store, open_store
from actcache.clients.dataset import Dataset
from actcache.schemas.array import ArrayLayout
from actcache.schemas.root import ROOT_KEY
from benchmarks import readers
from benchmarks.counting import counting
from benchmarks.datasets import STORED, copy, layout_of, wide
from benchmarks.material import Material
from benchmarks.ratio import Result, alternate, compare, timed
from benchmarks.s3_server import fsspec_store, s3_url

TITLE = "read_random: random tokens of one site, 768 wide; indexes are known"
GOAL = 1.3
READS = 40
MANY = 10_000
ROWS, AT, RAW = "ds.rows", "ds.at", "bare range and decoding"
GetRange = Callable[[str, int, int], Any]


def run(material: Material) -> Iterator[Result]:
    """Compare on files, then on S3."""
    for dtype in ("float32", "bfloat16"):
        folder = wide(material, dtype)
        yield from _single(material, f"{dtype}, files", folder, layout_of(folder, STORED), _pread(folder))
        yield from _many(material, f"{dtype}, files", folder, zarr.open_array(folder / STORED, mode="r"), folder)
    with s3_url() as url:
        if url is None:
            return
        for dtype in ("float32", "bfloat16"):
            folder, there = wide(material, dtype), f"{url}/{dtype}"
            store, layout = open_store(there), layout_of(folder, STORED)
            assert isinstance(store, RemoteStore)
            copy(folder, store, [ROOT_KEY, layout.metadata_key, *layout.shard_keys()])
            yield from _single(material, f"{dtype}, S3", there, layout, _range_get(store))
            with fsspec_store(there) as names:
                yield from _many(material, f"{dtype}, S3", there, zarr.open_array(names, path=STORED, mode="r"), None)


def _single(
    material: Material, where: str, url: str | Path, layout: ArrayLayout, get_range: GetRange
) -> Iterator[Result]:
    ds = actcache.open(url)
    indexes = _indexes(open_store(url), layout)
    rng = np.random.default_rng(0)
    for shard in range(layout.n_shards):  # from here on, every index is known
        ds.rows(STORED, shard * layout.shard_rows, shard * layout.shard_rows + 1)

    def raw(token: int) -> np.ndarray:
        shard, row = divmod(token, layout.shard_rows)
        chunk, row = divmod(row, layout.chunk_rows)
        offset, length = indexes[shard][chunk].tolist()
        out = np.empty((layout.chunk_rows, *layout.row_shape), layout.numpy_dtype)
        readers.decode_chunk(np.frombuffer(get_range(layout.shard_key(shard), offset, length), np.uint8), out)
        return out[row : row + 1]

    ways = {
        ROWS: lambda token: ds.rows(STORED, token, token + 1),
        AT: lambda token: ds.at([token]).site(STORED, "stored").compute(scheduler="synchronous"),
        RAW: raw,
    }
    for token in rng.integers(0, layout.rows, READS).tolist():
        for way in (ROWS, AT):
            with counting() as count:
                found = ways[way](token)
            if len(count.requests) != 1:
                raise AssertionError(f"{where}: {way} of one token made {len(count.requests)} requests")
            if found.tobytes() != raw(token).tobytes():
                raise AssertionError(f"{where}: {way} read other values")
    sides = {name: _latency(way, rng, layout.rows) for name, way in ways.items()}
    times = alternate(sides, material.seconds)
    for way, goal in (
        (ROWS, GOAL),
        (AT, None),
    ):  # the second has a Dask graph to make, which takes a millisecond by itself
        yield compare(
            "read_random",
            f"{where}: one token by {way}, one request, median time ÷ {RAW}",
            times,
            way,
            RAW,
            goal=goal,
            better="lower",
        )


def _latency(way: Callable[[int], object], rng: np.random.Generator, rows: int) -> Callable[[], float]:
    """A side whose seconds are the median of some single reads."""

    def side() -> float:
        seconds = []
        for token in rng.integers(0, rows, READS).tolist():
            began = time.perf_counter()
            way(token)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    return side


def _many(material: Material, where: str, url: str | Path, opened: Any, folder: Path | None) -> Iterator[Result]:
    ds: Dataset = actcache.open(url)
    tokens = np.random.default_rng(1).integers(0, ds.n_tokens, MANY)
    wanted = ds.at(tokens).site(STORED, "stored")
    with counting() as count:
        found = wanted.compute(scheduler="threads")
    chunks = len(np.unique(tokens // opened.chunks[0]))
    print(
        f"  {where}: {MANY:,} tokens of {ds.n_tokens:,} lie in {chunks:,} chunks: {len(count.requests):,} requests, "
        f"{count.bytes_below(STORED) / 1e6:.0f} MB"
    )
    sides: dict[str, Callable[[], object]] = {
        AT: lambda: wanted.compute(scheduler="threads"),
        "zarr-python, oindex": lambda: opened.oindex[tokens],
    }
    if folder is not None and (other := readers.tensorstore_array(folder / STORED)) is not None:
        sides["tensorstore"] = lambda: other[tokens].read().result()
    for name, work in sides.items():
        if np.asarray(work()).tobytes() != found.tobytes():
            raise AssertionError(f"{where}: {name} read other values")
    times = alternate({name: timed(work) for name, work in sides.items()}, material.seconds, rounds=3)
    for peer in list(sides)[1:]:
        yield compare("read_random", f"{where}: {MANY:,} tokens at once ÷ {peer}", times, AT, peer)


def _indexes(store: Store, layout: ArrayLayout) -> list[np.ndarray]:
    ends = [(key, store.get_end(key, layout.index_bytes)) for key in layout.shard_keys()]
    return [decode_index(layout, end, key) for key, end in ends]


def _pread(folder: Path) -> GetRange:
    def get(key: str, offset: int, length: int) -> bytes:
        with open(folder / key, "rb") as file:
            return os.pread(file.fileno(), length, offset)

    return get


def _range_get(store: RemoteStore) -> GetRange:
    return lambda key, offset, length: obstore.get_range(store.objects, key, start=offset, length=length)
