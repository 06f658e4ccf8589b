"""Batches in a shuffled order ÷ reading the same objects whole, one after the other, through the same reader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from actcache.cache.encoder import encode_shard
from actcache.cache.location import Location
from actcache.cache.store import open_store
from actcache.clients.loader import Batches
from actcache.clients.sources import StoredSource
from actcache.clients.token_index import Span
from benchmarks.material import THREADS, Material, default_cut, layout
from benchmarks.ratio import Result, Times, alternate, compare, timed

TITLE = "loader: an epoch of batches of 4096 float32 rows, shuffled ÷ reading whole objects in order, bytes/s"
TOKENS = 1 << 18
BUFFER = 1 << 16
GOAL = 0.8


def run(material: Material) -> Iterator[Result]:
    """Compare for both dtypes. The buffer holds a quarter of the tokens, as if there were many more."""
    width = material.widths[1]
    print(f"  {TOKENS:,} tokens of {width}, the files in memory; {THREADS} cores; a window of {BUFFER:,} tokens")
    for dtype in ("float32", "bfloat16"):
        folder = material.memory / f"{material.folder.name}-loader"
        try:
            source = _stored(material, str(folder), width, dtype)
            times = _times(source, material.seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        size = TOKENS * width * 4 / 1e9
        yield compare(
            "loader", f"{dtype}, shuffled", times, "shuffled", "read", goal=GOAL, amount=size, unit="GB/s of float32"
        )
        yield compare(
            "loader", f"{dtype}, in order", times, "in order", "read", goal=GOAL, amount=size, unit="GB/s of float32"
        )


def _stored(material: Material, url: str, width: int, dtype: str) -> StoredSource:
    rows = material.activations(width, dtype, TOKENS)
    array = layout(rows, *default_cut(width, dtype))
    store = open_store(url)
    with ThreadPoolExecutor(THREADS) as pool:
        for shard in range(array.n_shards):
            low, high = array.shard_range(shard)
            store.put_new(array.shard_key(shard), encode_shard(array, rows[low:high], pool))
    return StoredSource(Location.of(url), dtype, array)


def _times(source: StoredSource, seconds: float) -> Times:
    def read() -> None:
        rows = source.open()
        cuts = rows.cuts.tolist()
        for low, high in pairwise(cuts):
            rows.read(low, high)

    def give(shuffle: int | None) -> None:
        batches = Batches({"x": source}, Span(0, TOKENS), shuffle=shuffle, buffer=BUFFER)
        if sum(len(batch["x"]) for batch in batches) != TOKENS:
            raise AssertionError("not every token came")

    return alternate(
        {"shuffled": timed(lambda: give(0)), "in order": timed(lambda: give(None)), "read": timed(read)}, seconds
    )
