"""A remote dataset read through a cache on a local disk, which keeps what the dataset's manifests vouch for."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from threading import Lock
from typing import NoReturn, cast

from actcache.cache.cache_folder import cache_folder
from actcache.cache.cache_index import INDEX, CacheIndex
from actcache.cache.location import LocalCache, Location
from actcache.cache.store import Store
from actcache.schemas.canonical import digest, is_sha256, sha256
from actcache.schemas.errors import ActcacheError, Corrupt, InvalidInput, NotFound, StoreError, Unsupported
from actcache.schemas.manifest import MAX_MANIFEST_BYTES, find_object, manifest_key
from actcache.schemas.plan import StoredObject
from actcache.schemas.root import MAX_ROOT_BYTES, ROOT_KEY
from actcache.schemas.root_document import parse_root

LEAST_BYTES = 1 << 20
DEFAULT_BYTES = 100 * 10**9
ENTRIES_KEPT = 1 << 16
_loading = Lock()


def _renew_lock() -> None:
    """A child must not wait for a thread of its parent."""
    global _loading
    _loading = Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_lock)


def with_local_cache(location: Location, folder: str | Path | None, limit: int | None) -> Location:
    """A location whose store reads through a cache folder of at most `limit` bytes; a local folder stays as it is.

    Raises:
        InvalidInput: a bound without a folder, one that is no number of bytes or too small for the index, or a file's path.
    """
    if folder is None:
        if limit is not None:
            raise InvalidInput("local_cache_bytes bounds a cache: give its folder as local_cache too")
        return location
    if isinstance(limit, bool) or not isinstance(limit, int | None):
        raise InvalidInput(f"local_cache_bytes is {limit!r}: give a whole number of bytes, such as 50 * 10**9")
    if limit is not None and limit < LEAST_BYTES:
        raise InvalidInput(f"local_cache_bytes is {limit:,}: a cache needs {LEAST_BYTES:,} bytes at least")
    if not str(folder) or "://" in str(folder):
        raise InvalidInput(f"local_cache is {str(folder)!r}: give a folder on a local disk")
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise InvalidInput(f"local_cache {path} is a file: give a folder")
    if location.scheme == "file":
        return location
    return replace(location, cache=LocalCache(str(path), limit or _default_bytes(path)))


def _default_bytes(folder: Path) -> int:
    """100 GB, or half of what the disk has for the cache: what is free, and what the cache holds already."""
    held = 0
    if (folder / INDEX).exists():
        with suppress(OSError):
            held = CacheIndex(folder).total()
    there = folder
    while not there.exists():
        there = there.parent
    return max(LEAST_BYTES, min(DEFAULT_BYTES, (shutil.disk_usage(there).free + held) // 2))


class CachedStore(Store):
    """A remote store, read through a folder. The root, and what no manifest names, are read from the remote alone.

    It goes by the manifests of the root that was read through it, or that its location names: so the arrays of a dataset keep to
    the dataset that was opened, in any process, also where another one is made at the same URL.
    """

    def __init__(self, remote: Store, cache: LocalCache) -> None:
        self.remote = remote
        self.location = replace(remote.location, cache=cache)
        self._folder = cache_folder(cache.folder, cache.limit)
        self._entries: dict[str, StoredObject | None] = {}
        self._manifests: tuple[tuple[str, bytes | mmap], ...] | None = None

    def get(self, key: str, limit: int | None = None) -> memoryview:
        """See `Store`. A kept object is mapped, not copied.

        Raises:
            Corrupt: the remote's bytes are not those of the manifest.
        """
        if key == ROOT_KEY:
            data = self.remote.get(key, limit)
            self._follow(bytes(data))
            return data
        entry = self._entry(key)
        if entry is None:
            return self.remote.get(key, limit)
        self.check_limit(key, entry.size, limit)
        if entry.size == 0:
            return memoryview(b"")
        found = self._folder.whole(entry.sha256, entry.size)
        if found is not None:
            return found
        try:
            data = self.remote.get(key, entry.size)
            hashed = sha256(data)
            problem = (
                None if hashed == entry.sha256 else f"its bytes hash to {hashed}, its manifest says {entry.sha256}"
            )
        except Unsupported:
            problem = f"has more than the {entry.size:,} bytes of its manifest"
        if problem is not None:
            if self._misread(key, entry):
                return self.get(key, limit)
            self._refuse(key, problem)
        self._folder.keep_whole(entry.sha256, data)
        return data

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `Store`. The range is kept by itself, unless the whole object is there.

        Raises:
            Corrupt: the remote's object is shorter than its manifest says.
        """
        entry = self._entry(key)
        if entry is None:
            return self.remote.get_range(key, start, length)
        length = min(length, entry.size - start)
        if length <= 0:
            return memoryview(b"")
        if length == entry.size or self.remote.part_bytes is None:  # from a server without ranges, all of it comes
            return self.get(key)[start : start + length]
        whole = self._folder.whole(entry.sha256, entry.size)
        if whole is not None:
            return memoryview(bytes(whole[start : start + length]))
        name = self._range_name(entry, start, length)
        found = self._folder.range(name, length)
        if found is None:
            found = self.remote.get_range(key, start, length)
            if len(found) != length:
                self._refuse(key, f"is shorter than the {entry.size:,} bytes of its manifest")
            self._folder.keep_range(name, found)
        return found

    def get_end(self, key: str, length: int) -> memoryview:
        """See `Store`."""
        entry = self._entry(key)
        if entry is None:
            return self.remote.get_end(key, length)
        start = max(0, entry.size - length)
        return self.get_range(key, start, entry.size - start)

    def size(self, key: str) -> int:
        """See `Store`. As the manifest says."""
        entry = self._entry(key)
        return self.remote.size(key) if entry is None else entry.size

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Raises `Unsupported`: a local cache is for reading."""
        self._read_only()

    def replace(self, key: str, data: bytes) -> None:
        """Raises `Unsupported`: a local cache is for reading."""
        self._read_only()

    def delete(self, key: str) -> None:
        """Raises `Unsupported`: a local cache is for reading."""
        self._read_only()

    def list(self, prefix: str = "") -> dict[str, int]:
        """See `Store`. Of the remote."""
        return self.remote.list(prefix)

    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        """See `Store`. Of the remote."""
        return self.remote.children(prefix)

    def _read_only(self) -> NoReturn:
        raise Unsupported(f"{self.location}: a store with a local cache is for reading; write without one")

    def _entry(self, key: str) -> StoredObject | None:
        """What the manifests say of a key, or None if they do not name it."""
        if key in self._entries:
            return self._entries[key]
        try:
            found = self._look_up(key)
        except Corrupt:
            self._forget()
            found = self._look_up(key)
        if len(self._entries) >= ENTRIES_KEPT:
            self._entries = {}
        self._entries[key] = found
        return found

    def _look_up(self, key: str) -> StoredObject | None:
        for name, manifest in self._load():
            found = find_object(manifest, key, str(self.location.child(name)))
            if found is not None:
                return found
        return None

    def _forget(self) -> None:
        """Read the manifests, and check them, anew: a mapped file may have been damaged since."""
        self._manifests, self._entries = None, {}

    def _misread(self, key: str, entry: StoredObject) -> bool:
        """Whether the manifest, read anew, says something else."""
        self._forget()
        return self._entry(key) != entry

    def _load(self) -> tuple[tuple[str, bytes | mmap], ...]:
        """The manifests, read when first needed."""
        found = self._manifests
        if found is None:
            with _loading:
                found = self._manifests
                if found is None:
                    found = self._manifests = tuple((key, self._manifest(key)) for key in self._names())
        return found

    def _names(self) -> tuple[str, ...]:
        """Keys of the manifests; none where there is no root."""
        if self._cache.manifests is None:
            data = self.remote.get_or_none(ROOT_KEY, MAX_ROOT_BYTES)
            if data is not None:
                self._follow(bytes(data))
        return self._cache.manifests or ()

    @property
    def _cache(self) -> LocalCache:
        return cast("LocalCache", self.location.cache)

    def _named(self, root: bytes) -> tuple[str, ...]:
        attributes = parse_root(root, str(self.location.child(ROOT_KEY))).attributes
        return tuple(
            manifest_key(generation.manifest, attributes.records(number))
            for number, generation in enumerate(attributes.generations)
        )

    def _follow(self, root: bytes) -> None:
        """Go by this root from now on. One that is not whole is refused by whoever reads it."""
        with suppress(ActcacheError):
            named = self._named(root)
            if named != self._cache.manifests:
                self._forget()
                self.location = replace(self.location, cache=replace(self._cache, manifests=named))

    def _manifest(self, key: str) -> bytes | mmap:
        hashed = key.rpartition("/manifest-")[2].removesuffix(".jsonl")
        if not is_sha256(hashed):
            raise Corrupt(f"{self.location.child(key)}: not the name of a manifest")
        found = self._folder.whole(hashed)
        if found is None:
            try:
                data = self.remote.get(key, MAX_MANIFEST_BYTES)
            except (NotFound, StoreError) as error:
                warnings.warn(f"{error}; what it names is read without the local cache", RuntimeWarning, stacklevel=2)
                return b""
            if sha256(data) != hashed:
                self._refuse(key, f"its bytes hash to {sha256(data)}")
            self._folder.keep_whole(hashed, data)
            found = self._folder.whole(hashed)
            if found is None:
                return bytes(data)
        return cast("mmap", found.obj)

    def _range_name(self, entry: StoredObject, start: int, length: int) -> str:
        """A range cannot be checked against its object's hash, so what one URL gave is never served for another."""
        return digest([self.location.url, self.location.endpoint_url, entry.sha256, start, length])

    def _refuse(self, key: str, problem: str) -> NoReturn:
        """Raise `Corrupt`, after a look at the root: perhaps another dataset was made here."""
        where = self.location.child(key)
        root = self.remote.get_or_none(ROOT_KEY, MAX_ROOT_BYTES)
        named: tuple[str, ...] = ()
        with suppress(ActcacheError):
            named = () if root is None else self._named(bytes(root))
        if named and not set(self._names()) <= set(named):
            raise Corrupt(f"{where}: another dataset was made at this URL since this one was opened; open it again")
        raise Corrupt(f"{where}: {problem}; copy it again from where the dataset came")
