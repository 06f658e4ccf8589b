"""What lies in a cache folder, in SQLite: the bytes of every file, when it was last used, and so what goes first.

A row is written before its file, in a transaction that makes room for it: so the rows never name fewer bytes than there are.
Each transaction has a connection of its own, and none is open while the process forks.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from threading import Lock

from actcache.cache.local_store import process_lives

INDEX = "index.sqlite"
OBJECTS = "objects"
STAGING = "staging"
INDEX_GROWTH = 256 << 10
"""Bytes that the index, its journal included, may grow by in one transaction."""
ABANDONED_AFTER = 3600.0
BUSY_SECONDS = 10.0
VERSION = 1
_NAME = re.compile(r"[0-9a-f]{64}(-range)?")
_STAGED = re.compile(r"[A-Za-z0-9_.\-]+\+[0-9]+\+[0-9a-f]{32}")
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_connected = Lock()
os.register_at_fork(before=_connected.acquire, after_in_parent=_connected.release, after_in_child=_connected.release)


def path_of(folder: Path, name: str) -> Path:
    """Where the file of a name lies."""
    return folder / OBJECTS / name[:2] / name


class CacheIndex:
    """The files of one cache folder. Any number of processes and threads may use it at once.

    Every method raises `OSError` where the folder cannot be written, is full, or its index is held by others for long.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / INDEX

    def reserve(self, name: str, size: int, limit: int, used: Mapping[str, float]) -> Path | None:
        """Make room for a file of `size` bytes, and an empty staging file to be written and renamed.

        None if there is no room, or the file is there. `used` is when other files were last used. What was not used for longest
        is unlinked first. The rename fails if the room was taken back meanwhile.
        """
        with self._transaction() as rows:
            _touch(rows, used)
            known = rows.execute("SELECT name, staged FROM files WHERE name = ?", (name,)).fetchall()
            if known and path_of(self.folder, name).exists():
                return None  # another process was faster
            self._drop(rows, known)
            excess = _total(rows) + size + self._own_bytes() + INDEX_GROWTH - limit
            if excess > 0 and excess > _total(rows):
                return None
            doomed = []
            for other, staged, freed in rows.execute("SELECT name, staged, bytes FROM files ORDER BY used, name"):
                if excess <= 0:
                    break
                doomed.append((other, staged))
                excess -= freed
            self._drop(rows, doomed)
            (self.folder / STAGING).mkdir(exist_ok=True)
            path_of(self.folder, name).parent.mkdir(parents=True, exist_ok=True)
            path = self.folder / STAGING / f"{_host()}+{os.getpid()}+{uuid.uuid4().hex}"
            rows.execute("INSERT INTO files VALUES (?, ?, ?, ?)", (name, size, time.time(), path.name))
            path.touch(exist_ok=False)
        return path

    def touch(self, used: Mapping[str, float]) -> None:
        """Note when files were used, in seconds since 1970."""
        with self._transaction() as rows:
            _touch(rows, used)

    def drop(self, name: str) -> None:
        """Remove a file."""
        with self._transaction() as rows:
            self._drop(rows, rows.execute("SELECT name, staged FROM files WHERE name = ?", (name,)).fetchall())
            path_of(self.folder, name).unlink(missing_ok=True)

    def give_up(self, name: str, staged: Path) -> None:
        """Take back the room of a file that was not written, unless another writer has it by now."""
        with self._transaction() as rows:
            staged.unlink(missing_ok=True)
            rows.execute("DELETE FROM files WHERE name = ? AND staged = ?", (name, staged.name))

    def reclaim(self) -> None:
        """Take back the room of writers that died, or that have been at it for an hour."""
        with self._transaction() as rows:
            for path in (self.folder / STAGING).glob("*+*+*"):
                if _abandoned(path):
                    path.unlink(missing_ok=True)
                    rows.execute("DELETE FROM files WHERE staged = ?", (path.name,))

    def total(self) -> int:
        """Bytes of all files, those being written included."""
        with self._transaction() as rows:
            return _total(rows)

    def _drop(self, rows: sqlite3.Connection, doomed: Iterable[tuple[str, str]]) -> None:
        """Remove rows and their files. The staging file goes first: its writer then cannot rename it any more."""
        for name, staged in doomed:
            if _STAGED.fullmatch(staged):
                (self.folder / STAGING / staged).unlink(missing_ok=True)
            if _NAME.fullmatch(name):
                path_of(self.folder, name).unlink(missing_ok=True)
            rows.execute("DELETE FROM files WHERE name = ?", (name,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _connected:
            try:
                rows = self._begin()
            except sqlite3.Error as error:
                raise _as_os_error(error) from None
            with closing(rows):
                opened = os.stat(self.path).st_ino
                try:
                    yield rows
                    rows.execute("COMMIT")
                except sqlite3.Error as error:
                    if _code(error) in DAMAGED:
                        self._remove_index()
                    raise _as_os_error(error) from None
                if os.stat(self.path).st_ino != opened:
                    raise OSError(errno.EAGAIN, "the index was removed")

    def _begin(self) -> sqlite3.Connection:
        """A connection that holds the only write lock, to an index that is whole; a damaged one is made anew from the files."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for attempt in range(2):
            rows = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                rows.execute("PRAGMA synchronous = OFF")  # the index can be made anew
                rows.execute("PRAGMA journal_mode = TRUNCATE")
                rows.execute("BEGIN IMMEDIATE")
                if rows.execute("PRAGMA user_version").fetchone() != (VERSION,):
                    self._fill(rows)
                _check_tables(rows)
            except sqlite3.Error as error:
                rows.close()
                if attempt or _code(error) not in DAMAGED:
                    raise
                self._remove_index()
            else:
                return rows
        raise AssertionError("unreachable")

    def _fill(self, rows: sqlite3.Connection) -> None:
        """Begin an index with the files that are there. Whatever is being written is given up: nobody counts it."""
        rows.execute("CREATE TABLE files (name TEXT PRIMARY KEY, bytes INTEGER, used REAL, staged TEXT) WITHOUT ROWID")
        rows.execute("CREATE INDEX by_use ON files (used, name)")
        rows.execute("CREATE TABLE total (bytes INTEGER)")
        rows.execute("INSERT INTO total VALUES (0)")
        for event, sign, row in (("INSERT", "+", "NEW"), ("DELETE", "-", "OLD")):
            rows.execute(
                f"CREATE TRIGGER count_{event} AFTER {event} ON files "
                f"BEGIN UPDATE total SET bytes = bytes {sign} {row}.bytes; END"
            )
        for path in (self.folder / STAGING).glob("*+*+*"):
            path.unlink(missing_ok=True)
        for name, (size, used) in self._files().items():
            rows.execute("INSERT INTO files VALUES (?, ?, ?, '')", (name, size, used))
        rows.execute(f"PRAGMA user_version = {VERSION}")

    def _files(self) -> dict[str, tuple[int, float]]:
        """Size and time of every file that is in its place."""
        found = {}
        for path in self.folder.glob(f"{OBJECTS}/[0-9a-f][0-9a-f]/*"):
            if _NAME.fullmatch(path.name) and path == path_of(self.folder, path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found[path.name] = (status.st_size, status.st_mtime)
        return found

    def _own_bytes(self) -> int:
        total = 0
        for path in (self.path, self.path.with_name(f"{INDEX}-journal")):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _remove_index(self) -> None:
        """Remove a damaged index, unless another process is at it, or has made a whole one."""
        with open(self.folder / "repair.lock", "wb") as lock:
            flock(lock, LOCK_EX | LOCK_NB)
            with suppress(sqlite3.Error), closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as rows:
                whole = rows.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                _check_tables(rows)
                if whole and rows.execute("PRAGMA user_version").fetchone() == (VERSION,):
                    return
            for path in (self.path, self.path.with_name(f"{INDEX}-journal")):
                path.unlink(missing_ok=True)


def _total(rows: sqlite3.Connection) -> int:
    return int(rows.execute("SELECT coalesce(max(bytes), 0) FROM total").fetchone()[0])


def _check_tables(rows: sqlite3.Connection) -> None:
    rows.execute("SELECT name, bytes, used, staged FROM files LIMIT 1").fetchone()
    rows.execute("SELECT bytes FROM total").fetchone()


def _touch(rows: sqlite3.Connection, used: Mapping[str, float]) -> None:
    rows.executemany("UPDATE files SET used = ? WHERE name = ?", [(when, name) for name, when in used.items()])


def _code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF


def _as_os_error(error: sqlite3.Error) -> OSError:
    """A failure of SQLite: passing where others hold the index or it is made anew, else the folder's own."""
    passing = _code(error) in (*DAMAGED, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return OSError(errno.EAGAIN if passing else errno.EIO, f"its index: {error}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.\-]", "-", socket.gethostname())


def _abandoned(path: Path) -> bool:
    host, pid, _ = path.name.rsplit("+", 2)
    try:
        old = time.time() - path.stat().st_mtime > ABANDONED_AFTER
    except FileNotFoundError:
        return True
    return old or (host == _host() and pid.isdecimal() and not process_lives(int(pid)))
