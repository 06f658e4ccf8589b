"""SHA-256 of local files, remembered by path, size and times, so that terabytes of weights are hashed once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

_TABLE = "create table if not exists hashes (path blob primary key, size int, mtime int, ctime int, sha256 text)"


class FileState(NamedTuple):
    """What tells a changed file from an unchanged one. Times in nanoseconds."""

    path: str
    size: int
    mtime: int
    ctime: int


def file_state(path: Path) -> FileState:
    """The state of a file, symbolic links followed.

    Raises:
        OSError: there is no such file.
    """
    real = path.resolve()
    stat = real.stat()
    return FileState(str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def memory_path() -> Path:
    """The file that remembers: `actcache/hashes.sqlite` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "actcache" / "hashes.sqlite"


def file_sha256(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file, as 64 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    states = [file_state(path) for path in paths]
    known = _recall(states)
    fresh: dict[FileState, str] = {}
    for state in states:
        if state not in known and state not in fresh:
            with open(state.path, "rb") as file:
                fresh[state] = hashlib.file_digest(file, "sha256").hexdigest()
    _remember({state: sha for state, sha in fresh.items() if file_state(Path(state.path)) == state})
    return [known.get(state) or fresh[state] for state in states]


def _recall(states: list[FileState]) -> dict[FileState, str]:
    known: dict[FileState, str] = {}
    asked = "select sha256 from hashes where path = ? and size = ? and mtime = ? and ctime = ?"
    try:
        with closing(_connect()) as database:
            for state in states:
                for (sha,) in database.execute(asked, _row(state)):
                    known[state] = sha
    except (OSError, sqlite3.Error):
        return {}
    return known


def _remember(hashes: dict[FileState, str]) -> None:
    if not hashes:
        return
    try:
        with closing(_connect()) as database, database:
            rows = [(*_row(state), sha) for state, sha in hashes.items()]
            database.executemany("insert or replace into hashes values (?, ?, ?, ?, ?)", rows)
    except (OSError, sqlite3.Error):
        pass  # nothing is lost but time: the next run hashes again


def _row(state: FileState) -> tuple[bytes, int, int, int]:
    return os.fsencode(state.path), state.size, state.mtime, state.ctime


def _connect() -> sqlite3.Connection:
    path = memory_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=10)
    database.execute(_TABLE)
    return database
