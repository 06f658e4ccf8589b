"""Opening, listing and verifying datasets: the functions behind `ac.open`, `ac.catalog` and `ac.verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

from actcache.cache.catalog import Entry
from actcache.cache.catalog import catalog as list_datasets
from actcache.cache.opening import read_root
from actcache.cache.store import open_store
from actcache.cache.verify import Report
from actcache.cache.verify import verify as check
from actcache.clients.dataset import Dataset
from actcache.clients.joined import Joined

THREADS = 4 * (os.cpu_count() or 1)


@overload
def open(
    url: str | Path, *, endpoint_url: str | None = ..., profile: str | None = ..., anonymous: bool = ...
) -> Dataset: ...
@overload
def open(
    url: list[str] | list[Path] | tuple[str | Path, ...],
    *,
    endpoint_url: str | None = ...,
    profile: str | None = ...,
    anonymous: bool = ...,
) -> Joined: ...
def open(
    url: str | Path | list[str] | list[Path] | tuple[str | Path, ...],
    *,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
) -> Dataset | Joined:
    """Open a sealed dataset: a local path, `s3://bucket/name` or `http(s)://…`. Reads its metadata alone, with one GET.

    A list of them is opened as one dataset along the token axis, where model, tokenizer and sites agree.

    Credentials, profile and endpoint of S3 are found as botocore finds them; `anonymous` signs nothing.

    Raises:
        NotFound: there is no dataset.
        NotSealed: a build was begun there and is not finished.
        Corrupt: its metadata is damaged.
        Unsupported: it is no dataset of a format that this version reads.
        StoreError: the store refused or failed.
        InvalidInput: several datasets do not agree; the message says where.
    """

    def one(each: str | Path) -> Dataset:
        store = open_store(each, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
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
