"""Opening, listing and verifying datasets: the functions behind `ac.open`, `ac.catalog` and `ac.verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actcache.cache.catalog import Entry
from actcache.cache.catalog import catalog as list_datasets
from actcache.cache.local_cache import with_local_cache
from actcache.cache.location import Location
from actcache.cache.opening import read_root
from actcache.cache.store import open_store
from actcache.cache.verify import Report
from actcache.cache.verify import verify as check
from actcache.clients.dataset import Dataset

THREADS = 4 * (os.cpu_count() or 1)


def open(  # noqa: A001  (the public name is actcache.open)
    url: str | Path,
    *,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
    local_cache: str | Path | None = None,
    local_cache_bytes: int | None = None,
) -> Dataset:
    """Open a sealed dataset: a local path, `s3://bucket/name` or `http(s)://…`. Reads its metadata alone, with one GET.

    Credentials, profile and endpoint of S3 are found as botocore finds them; `anonymous` signs nothing.

    `local_cache` is a folder that keeps what is read, so that reading it again takes no network; datasets and processes may
    share it. It holds at most `local_cache_bytes`, by default 100 GB or half of what is free on its disk, if that is less; what
    was not read for longest goes first. A dataset in a local folder needs none, and makes none.

    Raises:
        InvalidInput: a URL of another kind, or a cache that cannot be.
        NotFound: there is no dataset.
        NotSealed: a build was begun there and is not finished.
        Corrupt: its metadata is damaged.
        Unsupported: it is no dataset of a format that this version reads.
        StoreError: the store refused or failed.
    """
    location = Location.of(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    store = open_store(with_local_cache(location, local_cache, local_cache_bytes))
    return Dataset(store, read_root(store))


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
