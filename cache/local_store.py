"""A folder as a store: objects appear whole, under a name that nobody had, and are on disk before anyone is told."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from actcache.cache.location import Location
from actcache.cache.store import Store
from actcache.schemas.errors import NotFound, StoreError

T = TypeVar("T")

STAGING = ".actcache/staging"
ATTEMPTS = 10  # at making a folder that others remove as soon as it is empty


class LocalStore(Store):
    """Files below a folder.

    A new object is written to a staging file, synced, then hard-linked to its name: the link fails if the name exists.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.root = Path(location.path)
        with self._reading(""):
            if self.root.is_file():
                raise StoreError(f"{self.root} is a file; a dataset is a folder")

    def get(self, key: str, limit: int | None = None) -> memoryview:
        """See `Store`. The file is mapped, not copied."""
        with self._reading(key), open(self.root / key, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.check_limit(key, size, limit)
            if size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `Store`."""
        with self._reading(key), open(self.root / key, "rb") as file:
            return memoryview(os.pread(file.fileno(), length, start))

    def get_end(self, key: str, length: int) -> memoryview:
        """See `Store`."""
        with self._reading(key), open(self.root / key, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return memoryview(os.pread(file.fileno(), length, max(0, size - length)))

    def size(self, key: str) -> int:
        """See `Store`."""
        with self._reading(key):
            return (self.root / key).stat().st_size

    def put_new(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """See `Store`."""
        path = self.root / key
        with self._writing(key):
            if path.exists():
                return False
            staged = self._stage(data)
            try:
                if not _link(staged, path):
                    return False
            finally:
                staged.unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # another process deleted it already, and its folder
                _sync_folder(path.parent)
            return True

    def replace(self, key: str, data: bytes) -> None:
        """See `Store`."""
        path = self.root / key
        with self._writing(key):
            staged = self._stage(data)
            try:
                _in_folder(path.parent, lambda: os.replace(staged, path))
            finally:
                staged.unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # a lease may be given back by now, and its folder with it
                _sync_folder(path.parent)

    def delete(self, key: str) -> None:
        """See `Store`. Folders that this leaves empty go too."""
        path = self.root / key
        with self._writing(key):
            path.unlink(missing_ok=True)
            self._remove_empty(path.parent)

    def list(self, prefix: str = "") -> dict[str, int]:
        """See `Store`."""
        found: dict[str, int] = {}
        folders = [self.root / prefix]
        with self._reading(prefix or "."):
            while folders:
                try:
                    entries = list(os.scandir(folders.pop()))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                for entry in entries:
                    if _is_folder(entry):
                        folders.append(Path(entry.path))
                    elif entry.is_file():
                        with suppress(FileNotFoundError):
                            found[Path(entry.path).relative_to(self.root).as_posix()] = entry.stat().st_size
        return found

    def children(self, prefix: str) -> tuple[set[str], set[str]]:
        """See `Store`."""
        with self._reading(prefix or "."):
            try:
                entries = list(os.scandir(self.root / prefix))
            except (FileNotFoundError, NotADirectoryError):
                return set(), set()
            folders = {entry.name for entry in entries if _is_folder(entry)}
            return folders, {entry.name for entry in entries if entry.is_file()}

    def clean_staging(self) -> None:
        """Remove staging files of this host's dead processes."""
        folder = self.root / STAGING
        with self._writing(STAGING):
            if not folder.is_dir():
                return
            with suppress(FileNotFoundError):  # another process removed the empty folder
                for path in folder.iterdir():
                    host, _, pid = path.name.rpartition("+")[0].rpartition("+")
                    if host == socket.gethostname() and pid.isdecimal() and not process_lives(int(pid)):
                        path.unlink(missing_ok=True)
            self._remove_empty(folder)

    def _stage(self, data: bytes | bytearray | memoryview) -> Path:
        # A name that nobody else has, in any container that shares the folder.
        path = self.root / STAGING / f"{socket.gethostname()}+{os.getpid()}+{uuid.uuid4().hex}"
        file = _in_folder(path.parent, lambda: open(path, "xb"))  # noqa: SIM115  (closed below)
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _remove_empty(self, folder: Path) -> None:
        with suppress(OSError):
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"{self.root / key}: no such object") from None
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{self.root / key}: cannot be read: {error.strerror}") from None

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"{self.root / key}: {error.strerror}; free some space and run the same command again, it resumes"
                ) from None
            hint = "; this file system has no hard links" if error.errno in (errno.EPERM, errno.EOPNOTSUPP) else ""
            raise StoreError(f"{self.root / key}: cannot be written: {error.strerror}{hint}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, and no link that leads back up."""
    if not entry.is_symlink():
        return entry.is_dir()
    above = Path(entry.path).parent.resolve()
    try:
        return entry.is_dir() and Path(entry.path).resolve() not in [above, *above.parents]
    except OSError:
        return False


def process_lives(pid: int) -> bool:
    """Whether a process of this host is still there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _link(staged: Path, path: Path) -> bool:
    """Give a staged file its name; False if the name is taken."""

    def link() -> bool:
        try:
            os.link(staged, path)
        except FileExistsError:
            return False
        return True

    return _in_folder(path.parent, link)


def _in_folder(folder: Path, action: Callable[[], T]) -> T:
    """Do something in a folder, which is made, and made again if another process removes it, being empty, meanwhile."""
    for _ in range(ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            _make_folder(folder)
            return action()
    _make_folder(folder)
    return action()


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
