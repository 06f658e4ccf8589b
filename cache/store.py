"""What every store can do. Keys are relative to the dataset's URL; objects are created once and never changed."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from actcache.cache.location import Location
from actcache.schemas.errors import NotFound, Unsupported
from actcache.schemas.plan import RECORDS

PROBES = f"{RECORDS}probes/"


class Store(ABC):
    """Bytes under one URL.

    Every method raises `StoreError` when the store refuses or fails; the reading ones raise `NotFound` for a missing key.
    """

    location: Location
    part_bytes: int | None = None
    """How much of a large object to ask for at once, or None where `get` costs nothing until its bytes are looked at."""
    gap_bytes: int = 16 << 10
    """Bytes that are cheaper read and thrown away than left out by a second request."""

    @abstractmethod
    def get(self, key: str, limit: int | None = None) -> memoryview:
        """The whole object.

        Raises:
            Unsupported: it has more than `limit` bytes; none of them was read.
        """

    def check_limit(self, key: str, size: int, limit: int | None) -> None:
        """Refuse an object that is too large to be what it should be."""
        if limit is not None and size > limit:
            raise Unsupported(
                f"{self.location.child(key)}: {size:,} bytes are more than the {limit:,} that it may have"
            )

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """`length` bytes from `start`; fewer where the object ends before."""

    @abstractmethod
    def get_end(self, key: str, length: int) -> memoryview:
        """The last `length` bytes of an object."""

    def get_tail(self, key: str, length: int) -> tuple[memoryview, int]:
        """The last `length` bytes of an object, and how many it has."""
        return self.get_end(key, length), self.size(key)

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of an object."""

    @abstractmethod
    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Create an object, whole or not at all. False, and nothing written, if the key exists.

        A retry inside the store may report False for what this very call wrote: look at what is there.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Write an object whether or not it exists, so that there is always the old one or the new. For leases and the root."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none. For leases, probes and staging alone."""

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, int]:
        """Every key that starts with `prefix` (empty or ending in a slash), with its size.

        Raises:
            Unsupported: the store has no listings (HTTP).
        """

    @abstractmethod
    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        """Names of the folders and of the objects directly below a prefix (empty or ending in a slash).

        Raises:
            Unsupported: the store has no listings (HTTP).
        """

    def get_or_none(self, key: str, limit: int | None = None) -> memoryview | None:
        """The whole object, or None if there is none."""
        try:
            return self.get(key, limit)
        except NotFound:
            return None

    def clean_staging(self) -> None:  # noqa: B027  (nothing to do where a PUT is atomic)
        """Remove what dead writers left half-written outside any key."""

    def probe_create_only(self, records: str = RECORDS) -> None:
        """Check that the store refuses to create a key twice; some S3-compatible servers accept and overwrite.

        The probe lies among the records of the build that asks, so that no other build tidies it away meanwhile.

        Raises:
            Unsupported: it does not refuse.
        """
        key = f"{records}probes/{uuid.uuid4().hex}"
        try:
            self.put_new(key, b"1")
            refused = not self.put_new(key, b"2")
        finally:
            self.delete(key)
        if not refused:
            raise Unsupported(
                f"{self.location}: this store ignores 'If-None-Match: *', so that two writers could overwrite each other; "
                "build into a local folder and copy it there"
            )


def open_store(
    url: str | Path | Location,
    *,
    endpoint_url: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
) -> Store:
    """The store at a URL: a local path, `s3://`, `http(s)://` (read-only) or `memory://` (this process alone).

    That of a remote location with a local cache reads through it.

    Raises:
        InvalidInput: a URL of another kind.
        StoreError: no credentials.
    """
    from actcache.cache.local_cache import CachedStore
    from actcache.cache.local_store import LocalStore
    from actcache.cache.remote_store import HttpStore, MemoryStore, S3Store

    location = Location.of(url, endpoint_url=endpoint_url, profile=profile, anonymous=anonymous)
    kinds: dict[str, Callable[[Location], Store]] = {
        "file": LocalStore,
        "s3": S3Store,
        "http": HttpStore,
        "https": HttpStore,
        "memory": MemoryStore,
    }
    store = kinds[location.scheme](location)
    return store if location.cache is None or location.scheme == "file" else CachedStore(store, location.cache)
