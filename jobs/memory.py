"""What is remembered between runs on one machine: facts that are costly to find and cheap to keep, in one SQLite file.

Losing it loses time alone; whatever cannot be read or written is found anew.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

_TABLES = (
    "create table if not exists hashes (path blob primary key, size int, mtime int, ctime int, sha256 text)",
    "create table if not exists facts (name text primary key, value text)",
)


def memory_path() -> Path:
    """The file that remembers: `actcache/hashes.sqlite` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "actcache" / "hashes.sqlite"


def ask(statement: str, many: Iterable[Sequence[Any]]) -> list[list[tuple[Any, ...]]]:
    """The rows of a query for each set of parameters; none where nothing can be read."""
    many = list(many)
    try:
        with closing(_connect()) as database:
            return [database.execute(statement, parameters).fetchall() for parameters in many]
    except (OSError, sqlite3.Error):
        return [[] for _ in many]


def tell(statement: str, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows, or not where nothing can be written."""
    if not rows:
        return
    try:
        with closing(_connect()) as database, database:
            database.executemany(statement, rows)
    except (OSError, sqlite3.Error):
        pass


def recall(name: str) -> str | None:
    """A fact by its name."""
    found = ask("select value from facts where name = ?", [(name,)])[0]
    return str(found[0][0]) if found else None


def remember(name: str, value: str) -> None:
    """Keep a fact."""
    tell("insert or replace into facts values (?, ?)", [(name, value)])


def _connect() -> sqlite3.Connection:
    path = memory_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=10)
    for table in _TABLES:
        database.execute(table)
    return database
