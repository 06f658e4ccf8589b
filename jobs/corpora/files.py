"""The files of a corpus: how each is opened, what identifies it, and whether it is still the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from actcache.jobs.fingerprint import FileState, file_sha256, file_state
from actcache.schemas.errors import InvalidInput
from actcache.schemas.plan import Source


class CorpusFile(Protocol):
    """A file, wherever it is."""

    @property
    def source(self) -> Source:
        """What the plan records."""

    @property
    def where(self) -> str:
        """The file as an error names it."""

    def read(self) -> bytes:
        """The whole content."""

    def open(self, *, seekable: bool = False) -> IO[bytes]:
        """The content as a stream; `seekable` where it must be read out of order."""

    def check_unchanged(self) -> None:
        """Check that the file is still what the plan records.

        Raises:
            InvalidInput: it has changed.
        """


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine, identified by the SHA-256 of its content."""

    path: Path
    source: Source
    state: FileState

    @property
    def where(self) -> str:
        """See `CorpusFile`."""
        return str(self.path)

    def read(self) -> bytes:
        """See `CorpusFile`."""
        return self.path.read_bytes()

    def open(self, *, seekable: bool = False) -> IO[bytes]:
        """See `CorpusFile`."""
        return self.path.open("rb")

    def check_unchanged(self) -> None:
        """See `CorpusFile`."""
        if file_state(self.path) != self.state and file_sha256([self.path]) != [self.source.sha256]:
            raise changed(self.where)


def local_files(found: dict[Path, str]) -> list[LocalFile]:
    """The files of these paths with the names that the plan is to give them, hashed.

    Raises:
        InvalidInput: one cannot be read.
    """
    paths = list(found)
    try:
        states = list(map(file_state, paths))
        hashes = file_sha256(paths)
    except OSError as error:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from None
    return [
        LocalFile(path, Source(name=printable(found[path]), bytes=state.size, sha256=sha), state)
        for path, state, sha in zip(paths, states, hashes, strict=True)
    ]


def changed(where: str) -> InvalidInput:
    """The error for a file that is not what it was when the build began."""
    return InvalidInput(f"{where}: the file changed since the build began; run the command again")


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")
