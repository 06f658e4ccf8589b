"""Uploading shards as a build does (create-only, then looked up on conflict, with a SHA-256) ÷ a bare obstore.put of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import obstore

from actcache.cache.encoder import encode_shard
from actcache.cache.publish import publish
from actcache.cache.remote_store import RemoteStore
from actcache.cache.store import open_store
from benchmarks.material import THREADS, Material, layout
from benchmarks.ratio import Result, alternate, compare, timed
from benchmarks.s3_server import s3_url

TITLE = "s3_upload: create-only PUTs of encoded shards ÷ a bare obstore.put of the same bytes, bytes/s"
GOAL = 0.9
SHARDS = 4
AT_ONCE = 4


def run(material: Material) -> Iterator[Result]:
    """Compare `publish`, and `put_new` alone, with one PUT an object at the same concurrency."""
    with s3_url() as url:
        if url is None:
            return
        width = material.widths[1]
        rows = material.activations(width, "float32", SHARDS * 16384)
        array = layout(rows, 128, 16384)
        with ThreadPoolExecutor(THREADS) as pool:
            shards = [encode_shard(array, rows[i : i + 16384], pool) for i in range(0, len(rows), 16384)]
        size = sum(map(len, shards))
        print(
            f"  {SHARDS} shards, {size / 1e6:.0f} MB, {AT_ONCE} at once; both sides and the server share the processor"
        )
        store = open_store(url)
        assert isinstance(store, RemoteStore)
        frozen = [bytes(shard) for shard in shards]
        sides = {
            "publish": lambda: _each(lambda number: publish(store, f"shard-{number}", shards[number])),
            "obstore.put": lambda: _each(
                lambda number: obstore.put(store.objects, f"shard-{number}", frozen[number], use_multipart=False)
            ),
            "put_new": lambda: _each(lambda number: store.put_new(f"shard-{number}", shards[number])),
        }
        times = alternate({name: _side(work, store) for name, work in sides.items()}, material.seconds)
        for ours in ("publish", "put_new"):
            yield compare(
                "s3_upload",
                f"{ours} ÷ obstore.put",
                times,
                ours,
                "obstore.put",
                goal=GOAL,
                amount=size / 1e6,
                unit="MB/s",
            )


def _side(work: Callable[[], object], store: RemoteStore) -> Callable[[], float]:
    measure = timed(work)

    def side() -> float:
        seconds = measure()
        for number in range(SHARDS):
            store.delete(f"shard-{number}")
        return seconds

    return side


def _each(work: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(SHARDS)))
