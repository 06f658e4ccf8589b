"""A folder that keeps files by the hash of what they hold, up to a number of bytes, and mistrusts what it finds."""

from __future__ import annotations

import atexit
import errno
import hashlib
import mmap
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from actcache.cache.cache_index import CacheIndex, path_of

TOUCHES_KEPT = 512
TOUCH_SECONDS = 10.0
PAUSE_SECONDS = 60.0
CHECKS_KEPT = 1 << 17
DIGEST_BYTES = 32
_QUIET = (errno.ENOENT, errno.EAGAIN)
"""The folder was removed, or its index is being made anew, by others: this time nothing is kept."""


class CacheFolder:
    """Files of one folder, for any number of threads. Whatever goes wrong in it, nothing is raised: then nothing is kept.

    The file of a whole object is named by its SHA-256. That of a range has a name of its own, and ends in the SHA-256 of the
    rest. A file is checked when this process first reads it, and again when it was changed since.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._index = CacheIndex(folder)
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._used: dict[str, float] = {}
        self._noted = time.monotonic()
        self._paused_until = 0.0
        self._warned = self._reclaimed = False

    def whole(self, digest: str, size: int | None = None) -> memoryview | None:
        """The object of this SHA-256, of so many bytes where that is known, mapped; None if it is not there."""
        return self._find(digest, size, bytes.fromhex(digest))

    def keep_whole(self, digest: str, data: memoryview) -> None:
        """Keep an object, which the caller has checked."""
        self._keep(digest, (data,))

    def range(self, name: str, size: int) -> memoryview | None:
        """The range of this name, of `size` bytes; None if it is not there."""
        return self._find(f"{name}-range", size, None)

    def keep_range(self, name: str, data: memoryview) -> None:
        """Keep a range."""
        self._keep(f"{name}-range", (data, hashlib.sha256(data).digest()))

    def note_use(self) -> None:
        """Write down what was used since the last time."""
        if used := self._take_used():
            with suppress(OSError):
                self._index.touch(used)

    def _find(self, name: str, size: int | None, digest: bytes | None) -> memoryview | None:
        trailer = DIGEST_BYTES if digest is None else 0
        try:
            with open(path_of(self.folder, name), "rb") as file:
                status = os.fstat(file.fileno())
                stored = status.st_size
                data = None
                if stored > trailer and size in (None, stored - trailer):
                    # A mapping holds a file descriptor, and shard indexes, which are ranges, are held in numbers.
                    mapped = mmap.mmap(file.fileno(), stored, access=mmap.ACCESS_READ) if digest else file.read(stored)
                    data = memoryview(mapped) if len(mapped) == stored else None
        except (OSError, ValueError):  # ValueError: it was cut short meanwhile
            return None
        seen = (status.st_ino, status.st_mtime_ns, stored)
        if data is not None and self._checked.get(name) != seen:
            found = hashlib.sha256(data[: stored - trailer]).digest()
            if found != (data[stored - trailer :] if digest is None else digest):
                data = None
            else:
                self._remember(name, seen)
        if data is None:
            with suppress(OSError):
                self._index.drop(name)
            return None
        self._used[name] = time.time()
        if len(self._used) >= TOUCHES_KEPT or time.monotonic() - self._noted > TOUCH_SECONDS:
            self.note_use()
        return data[: stored - trailer]

    def _take_used(self) -> dict[str, float]:
        used, self._used = self._used, {}
        self._noted = time.monotonic()
        return used.copy()  # another thread may still add to the old one

    def _remember(self, name: str, seen: tuple[int, int, int]) -> None:
        self._checked[name] = seen
        if len(self._checked) > CHECKS_KEPT:
            with suppress(StopIteration, RuntimeError):  # another thread is at it
                self._checked.pop(next(iter(self._checked)), None)

    def _keep(self, name: str, pieces: tuple[bytes | memoryview, ...]) -> None:
        size = sum(len(piece) for piece in pieces)
        if size > self.limit or time.monotonic() < self._paused_until:
            return
        with self._trouble():
            if not self._reclaimed:
                self._reclaimed = True
                self._index.reclaim()
            staged = self._index.reserve(name, size, self.limit, self._take_used())
            if staged is None:
                return
            try:
                with open(staged, "r+b") as file:
                    for piece in pieces:
                        file.write(piece)
                os.rename(staged, path_of(self.folder, name))
            except BaseException:
                with suppress(OSError):
                    self._index.give_up(name, staged)
                raise

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """Nothing is kept for a while where nothing can be, which is said once."""
        try:
            yield
        except OSError as error:
            if error.errno in _QUIET:
                return
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"local cache {self.folder}: {error.strerror or error}; what cannot be kept there is read without it",
                    RuntimeWarning,
                    stacklevel=2,
                )


@lru_cache(maxsize=64)
def cache_folder(folder: str, limit: int) -> CacheFolder:
    """The cache in a folder: one in a process, so that what it checked and used is known to all who read through it."""
    found = CacheFolder(Path(folder), limit)
    atexit.register(found.note_use)
    return found
