"""Create-only writes that survive retries, crashes and races.

A conditional PUT that fails may have succeeded on a try before. So on "exists already", look at what is there: equal
bytes are success; a shard of equal values was encoded by another library version, and is as good; a whole shard of
other values was computed by an earlier attempt on other hardware: it is kept and reported, never overwritten, never mixed silently.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from actcache.cache.encoder import encode_shard
from actcache.cache.shards import decode_shard
from actcache.cache.store import Store
from actcache.schemas.array import ArrayLayout
from actcache.schemas.canonical import canonical, sha256
from actcache.schemas.errors import Corrupt, NotFound, SpecMismatch, StoreError
from actcache.schemas.plan import StoredObject

ATTEMPTS = 3


@dataclass(frozen=True)
class Published:
    """What is stored under a key now.

    `other` holds its bytes if they are not those that were offered; `created` says whether this call wrote it, as far as
    the store tells (two racing writers may offer equal bytes).
    """

    stored: StoredObject
    other: memoryview | None = None
    created: bool = False


def publish(store: Store, key: str, data: bytes | bytearray | memoryview) -> Published:
    """Create an object, or find what is there.

    Raises:
        StoreError: the store refused or failed, and the object is not there.
    """
    mine = StoredObject(key=key, size=len(data), sha256=sha256(data))
    dropped = False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if store.put_new(key, data):
                return Published(mine, created=True)
        except StoreError:
            # The connection may have dropped after the write took effect.
            if attempt == ATTEMPTS or store.get_or_none(key) is None:
                raise
            dropped = True
        try:
            there = store.get(key)
        except NotFound:
            continue
        found = StoredObject(key=key, size=len(there), sha256=sha256(there))
        return Published(mine, created=dropped) if found == mine else Published(found, there)
    raise StoreError(
        f"{store.location.child(key)}: exists and does not exist; another program is deleting objects here"
    )


def publish_metadata(store: Store, layout: ArrayLayout) -> StoredObject:
    """Write an array's metadata before its first shard, which claims the name.

    Raises:
        SpecMismatch: the name is held by an array of another shape, dtype or cut.
    """
    return publish_document(store, layout.metadata_key, layout.document())


def publish_document(store: Store, key: str, document: dict[str, object]) -> StoredObject:
    """Write a JSON document create-only.

    Raises:
        SpecMismatch: another document lies there.
    """
    held = "held by another build with other metadata; build into another URL, or remove that one"
    return publish_same(store, key, canonical(document), held)


def publish_same(store: Store, key: str, data: bytes, otherwise: str) -> StoredObject:
    """Create an object, or find the same there.

    Raises:
        SpecMismatch: another lies there; `otherwise` says what that means.
    """
    published = publish(store, key, data)
    if published.other is not None:
        raise SpecMismatch(f"{store.location.child(key)}: {otherwise}")
    return published.stored


@dataclass(frozen=True)
class PublishedShard:
    """A stored shard. `kept` holds its rows if an earlier attempt wrote other values than those offered."""

    stored: StoredObject
    kept: np.ndarray | None = None


def publish_shard(store: Store, layout: ArrayLayout, index: int, data: memoryview) -> PublishedShard:
    """Create a shard, or adopt what is there if it is whole.

    Raises:
        Corrupt: what is there is no valid shard of this array.
    """
    key = layout.shard_key(index)
    published = publish(store, key, data)
    if published.other is None:
        return PublishedShard(published.stored)
    low, high = layout.shard_range(index)
    where = str(store.location.child(key))
    try:
        theirs = decode_shard(layout, published.other, high - low, where)
    except Corrupt as error:
        raise Corrupt(
            f"{where}: holds something that is no shard of this array; remove it and run again ({error})"
        ) from None
    mine = decode_shard(layout, data, high - low, where)
    if mine.tobytes() == theirs.tobytes():
        return PublishedShard(published.stored)
    return PublishedShard(published.stored, theirs)


def publish_same_shard(store: Store, layout: ArrayLayout, index: int, data: memoryview, otherwise: str) -> StoredObject:
    """Create a shard, or find one of the same values there.

    Raises:
        SpecMismatch: other values lie there; `otherwise` says what that means.
        Corrupt: as `publish_shard`.
    """
    shard = publish_shard(store, layout, index, data)
    if shard.kept is not None:
        raise SpecMismatch(f"{store.location.child(layout.shard_key(index))}: {otherwise}")
    return shard.stored


def publish_array(store: Store, layout: ArrayLayout, rows: np.ndarray, pool: Executor) -> list[StoredObject]:
    """Write a whole array: metadata, then every shard.

    Raises:
        SpecMismatch: another array, or other values, lie there.
    """
    stored = [publish_metadata(store, layout)]
    for index in range(layout.n_shards):
        low, high = layout.shard_range(index)
        data = encode_shard(layout, rows[low:high], pool)
        held = "holds other values than this build computes; build into another URL"
        stored.append(publish_same_shard(store, layout, index, data, held))
    return stored
