"""Storing the token axis: every array of it, then the record that ends the tokenising."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

import numpy as np

from actcache.cache.encoder import ShardEncoder
from actcache.cache.lease import Lease
from actcache.cache.opening import read_tokens
from actcache.cache.publish import publish, publish_metadata, publish_same_shard
from actcache.cache.store import Store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.errors import SpecMismatch
from actcache.schemas.plan import TOKENS_KEY, StoredObject, TokensRecord

ROWS_AT_ONCE = 1 << 18
"""Small enough that the allocator uses memory again, large enough that making rows costs little: 2 MiB of int64."""
OTHER_TOKENS = (
    "holds other tokens than this tokenizer makes; another version of it began this build: use that one, "
    "or build into another URL"
)
Rows = Callable[[str, int, int], np.ndarray]


def stored_once(store: Store, make: Callable[[], TokensRecord]) -> TokensRecord:
    """The record of the stored tokens, or what `make` stores. One worker does it under a lease, others wait for it."""
    lease = Lease(store, "tokenise")
    while (done := read_tokens(store)) is None:
        if lease.acquire():
            with lease:
                return read_tokens(store) or make()  # the holder before may have finished between the two looks
        lease.wait()
    return done


def store_axis(
    store: Store, layouts: Mapping[str, ArrayLayout], rows_of: Rows, record: TokensRecord, pool: Executor
) -> TokensRecord:
    """Store the arrays, whose rows [start, stop) `rows_of(name, start, stop)` gives, and `record` with their hashes.

    Objects that the record names already stay in it.

    Raises:
        SpecMismatch: others are stored there.
    """
    objects: list[StoredObject] = list(record.objects)
    content: dict[str, str] = {}
    for name, layout in layouts.items():
        objects.append(publish_metadata(store, layout))
        hashed = hashlib.sha256()
        for index in range(layout.n_shards):
            encoder = ShardEncoder(layout, pool)
            start, stop = layout.shard_range(index)
            for low in range(start, stop, ROWS_AT_ONCE):
                rows = np.ascontiguousarray(rows_of(name, low, min(low + ROWS_AT_ONCE, stop)))
                encoder.append(rows)
                hashed.update(rows.data)  # while the pool packs the same rows
            objects.append(publish_same_shard(store, layout, index, encoder.finish(), OTHER_TOKENS))
        content[name] = hashed.hexdigest()
    record = record.model_copy(update={"content": content, "objects": tuple(objects)})
    published = publish(store, TOKENS_KEY, record.to_bytes())
    if published.other is None:
        return record
    theirs = TokensRecord.from_bytes(bytes(published.other), str(store.location.child(TOKENS_KEY)))
    if theirs.content != record.content:
        raise SpecMismatch(
            f"{store.location.child(TOKENS_KEY)}: another build stored other tokens here; build into another URL"
        )
    return theirs
