"""Opening, listing and verifying datasets: the functions behind `ac.open`, `ac.catalog` and `ac.verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

from actcache.cache.catalog import Entry
from actcache.cache.catalog import catalog as list_datasets
from actcache.cache.local_cache import with_local_cache
from actcache.cache.location import Location
from actcache.cache.opening import read_root
from actcache.cache.store import open_store
from actcache.cache.verify import Report
from actcache.cache.verify import verify as check
from actcache.clients.dataset import Dataset
from actcache.clients.joined import Joined

THREADS = 4 * (os.cpu_count() or 1)


@overload
def open(
    url: str | Path,
    *,
    endpoint_url: str | None = ...,
    profile: str | None = ...,
    anonymous: bool = ...,
    local_cache: str | Path | None = ...,
    local_cache_bytes: int | None = ...,
) -> Dataset: ...
@overload
def open(
    url: list[str] | list[Path] | tuple[str | Path, ...],
    *,
    endpoint_url: str | None = ...,
    profile: str | None = ...,
    anonymous: bool = ...,
    local_cache: str | Path | None = ...,
    local_cache_bytes: int | None = ...,
) -> Joined: ...
def open(
    url: str | Path | list[str] | list[Path] | tuple[str | Path, ...],
    *,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
    local_cache: str | Path | None = None,
    local_cache_bytes: int | None = None,
) -> Dataset | Joined:
    """Open a sealed dataset: a local path, `s3://bucket/name` or `http(s)://…`. Reads its metadata alone, with one GET.

    A list of them is opened as one dataset along the token axis, where model, tokenizer and sites agree.

    Credentials, profile and endpoint of S3 are found as botocore finds them; `anonymous` signs nothing.

    `local_cache` is a folder that keeps what is read, so that reading it again takes no network; datasets and processes may
    share it. It holds at most `local_cache_bytes`, by default 100 GB or half of what is free on its disk, if that is less; what
    was not read for longest goes first. A dataset in a local folder needs none, and makes none.

    Raises:
        InvalidInput: a URL of another kind, a cache that cannot be, or datasets that do not agree: the message says where.
        NotFound: there is no dataset.
        NotSealed: a build was begun there and is not finished.
        Corrupt: its metadata is damaged.
        Unsupported: it is no dataset of a format that this version reads.
        StoreError: the store refused or failed.
    """

    def one(each: str | Path) -> Dataset:
        location = Location.of(each, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
        store = open_store(with_local_cache(location, local_cache, local_cache_bytes))
        return Dataset(store, read_root(store))

    if isinstance(url, str | Path):
        return one(url)
    with ThreadPoolExecutor(THREADS) as pool:
        return Joined(list(pool.map(one, url)))


def catalog(
    prefix: str | Path, *, endpoint_url: str | None = None, profile: str | None = None, anonymous: bool = False
) -> list[Entry]:
    """Every dataset under a prefix, sealed or being built, sorted by URL.

    Raises:
        Unsupported: http(s), which has no listings.
        StoreError: the store refused or failed.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list_datasets(prefix, pool, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)


def verify(
    url: str | Path,
    *,
    full: bool = False,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a sealed dataset against its manifest: keys and sizes, and with `full` the SHA-256 of every object.

    Raises:
        NotFound, NotSealed: there is no sealed dataset.
        StoreError: the store refused or failed.
    """
    store = open_store(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    with ThreadPoolExecutor(THREADS) as pool:
        return check(store, pool, full=full, progress=progress)
