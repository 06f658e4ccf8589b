"""SHA-256 of local files, remembered by path, size and times, so that terabytes of weights are hashed once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path

_TABLE = "create table if not exists hashes (path text primary key, size int, mtime int, ctime int, sha256 text)"


def memory_path() -> Path:
    """The file that remembers: `actcache/hashes.sqlite` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "actcache" / "hashes.sqlite"


def file_sha256(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file, as 64 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    states = [_state(path) for path in paths]
    known = _recall(states)
    fresh: dict[tuple[str, int, int, int], str] = {}
    for state in states:
        if state not in known and state not in fresh:
            with open(state[0], "rb") as file:
                fresh[state] = hashlib.file_digest(file, "sha256").hexdigest()
    _remember({state: sha for state, sha in fresh.items() if _state(Path(state[0])) == state})
    return [known.get(state) or fresh[state] for state in states]


def _state(path: Path) -> tuple[str, int, int, int]:
    real = path.resolve()
    stat = real.stat()
    return str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _recall(states: list[tuple[str, int, int, int]]) -> dict[tuple[str, int, int, int], str]:
    wanted = {state[0]: state for state in states}
    try:
        with closing(_connect()) as database:
            asked = "select path, size, mtime, ctime, sha256 from hashes where path = ?"
            rows = [row for path in wanted for row in database.execute(asked, (path,))]
    except (OSError, sqlite3.Error):
        return {}
    return {wanted[row[0]]: row[4] for row in rows if wanted[row[0]] == tuple(row[:4])}


def _remember(hashes: dict[tuple[str, int, int, int], str]) -> None:
    if not hashes:
        return
    try:
        with closing(_connect()) as database, database:
            rows = [(*state, sha) for state, sha in hashes.items()]
            database.executemany("insert or replace into hashes values (?, ?, ?, ?, ?)", rows)
    except (OSError, sqlite3.Error):
        pass  # nothing is lost but time: the next run hashes again


def _connect() -> sqlite3.Connection:
    path = memory_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=10)
    database.execute(_TABLE)
    return database
