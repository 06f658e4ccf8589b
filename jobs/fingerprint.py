"""SHA-256 of local files, remembered by path, size and times, so that terabytes of weights are hashed once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from actcache.jobs.memory import ask, tell


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
    asked = "select sha256 from hashes where path = ? and size = ? and mtime = ? and ctime = ?"
    answers = ask(asked, map(_row, states))
    return {state: rows[0][0] for state, rows in zip(states, answers, strict=True) if rows}


def _remember(hashes: dict[FileState, str]) -> None:
    rows = [(*_row(state), sha) for state, sha in hashes.items()]
    tell("insert or replace into hashes values (?, ?, ?, ?, ?)", rows)


def _row(state: FileState) -> tuple[bytes, int, int, int]:
    return os.fsencode(state.path), state.size, state.mtime, state.ctime
