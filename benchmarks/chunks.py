"""Chunk sizes: how well they compress, how fast they decode in bulk, and what reading one token costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from actcache.cache.encoder import encode_shard
from actcache.cache.reader import ArrayReader
from actcache.cache.shards import decode_shard
from actcache.cache.store import Store, open_store
from actcache.schemas.array import ArrayLayout
from benchmarks.material import THREADS, Material, default_cut, layout
from benchmarks.ratio import Result, Times, alternate, compare, timed
from benchmarks.s3_server import s3_url

TITLE = "chunks: how many tokens a chunk should hold"
CHUNKS = (64, 128, 256, 512, 1024, 2048)
TOKENS = 16384
LOCAL_READS, S3_READS = 40, 20
DECODE_GOAL, COMPRESSION_GOAL = 0.9, 0.98


def run(material: Material) -> Iterator[Result]:
    """Three tables, and what the default chunk loses against the best one."""
    narrow, wide = material.widths
    print(
        f"  activations of {material.model_name}; {wide} wide are six sites side by side; one shard of {TOKENS} tokens;"
    )
    print(
        f"  decoding with {THREADS} threads; a token read is one range request (the shard's index is known) and one chunk"
    )
    with s3_url() as url:
        remote = None if url is None else open_store(url)
        for width, dtype in ((narrow, "float32"), (wide, "float32"), (wide, "bfloat16")):
            yield from _table(material, width, dtype, remote)


def _table(material: Material, width: int, dtype: str, remote: Store | None) -> Iterator[Result]:
    rows = material.activations(width, dtype, TOKENS)
    local = open_store(material.folder / "chunks")
    default, _ = default_cut(width, dtype)
    sizes = sorted({*CHUNKS, default})
    layouts = {size: layout(rows, size, -(-TOKENS // size) * size, f"{dtype}-{width}-{size}") for size in sizes}
    shards: dict[int, bytearray] = {}
    sides: dict[str, Callable[[], float]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for size, array in layouts.items():
            shards[size] = shard = encode_shard(array, rows, pool)
            sides[f"decode {size}"] = timed(_decoding(array, shard, pool))
            for where, store, reads in (("local", local, LOCAL_READS), ("S3", remote, S3_READS)):
                if store is not None:
                    store.put_new(array.shard_key(0), shard)
                    sides[f"{where} {size}"] = timed(_reading(ArrayReader(store, array), reads))
        times = alternate(sides, material.seconds)
    print(f"  {width} wide, {dtype}; a build's default is {default} tokens")
    _print_table(layouts, shards, times, rows.nbytes)
    name = f"{width} wide, {dtype}: the default of {default} tokens"
    ratios = {size: rows.nbytes / len(shard) for size, shard in shards.items()}
    lost = ratios[default] / max(ratios.values())
    yield Result("chunks", f"{name} ÷ the best compression", lost, lost, lost, 1, COMPRESSION_GOAL)
    fastest = min(sizes, key=lambda size: statistics.median(times[f"decode {size}"]))
    yield compare(
        "chunks",
        f"{name} ÷ the fastest to decode",
        times,
        f"decode {default}",
        f"decode {fastest}",
        goal=DECODE_GOAL,
        amount=THREADS * rows.nbytes / 1e9,
        unit="GB/s",
    )
    for where in ("local", "S3"):
        if f"{where} {default}" in times:
            ours, peer = f"{where} {default}", f"{where} {CHUNKS[0]}"
            yield compare(
                "chunks", f"{name}, time of a token ÷ {CHUNKS[0]}'s, {where}", times, ours, peer, better="lower"
            )


def _decoding(array: ArrayLayout, shard: bytearray, pool: ThreadPoolExecutor) -> Callable[[], object]:
    return lambda: list(pool.map(lambda _: decode_shard(array, shard, TOKENS, array.name).shape, range(THREADS)))


def _reading(reader: ArrayReader, reads: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)

    def read() -> None:
        for token in rng.integers(0, TOKENS, reads).tolist():
            reader.read(token, token + 1)

    return read


def _print_table(layouts: dict[int, ArrayLayout], shards: dict[int, bytearray], times: Times, raw: int) -> None:
    print("    tokens   raw KiB  compression  decode GB/s  token, local ms  token, S3 ms")
    for size, array in layouts.items():
        median = {
            kind: statistics.median(times.get(f"{kind} {size}", [float("nan")])) for kind in ("decode", "local", "S3")
        }
        print(
            f"    {size:6} {array.chunk_bytes / 1024:9.0f} {raw / len(shards[size]):12.3f} {THREADS * raw / median['decode'] / 1e9:12.2f} "
            f"{median['local'] / LOCAL_READS * 1e3:16.2f} {median['S3'] / S3_READS * 1e3:13.2f}"
        )
