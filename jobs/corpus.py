"""Corpora: text files, a document each, and JSONL files, a document a line."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from actcache.jobs.fingerprint import FileState, file_sha256, file_state
from actcache.schemas.canonical import digest
from actcache.schemas.errors import InvalidInput
from actcache.schemas.plan import Source
from actcache.schemas.spec import CorpusIdentity

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Document:
    """One corpus row: the index of its file, of the row in it, and its text."""

    source: int
    row: int
    text: str


@dataclass(frozen=True)
class Corpus:
    """Files in the order in which they are read."""

    kind: Literal["text", "jsonl"]
    text_field: str
    files: tuple[Path, ...]
    sources: tuple[Source, ...]
    states: tuple[FileState, ...]

    def identity(self) -> CorpusIdentity:
        """The corpus by its content."""
        return CorpusIdentity(
            kind=self.kind,
            files=len(self.files),
            content=digest([source.sha256 for source in self.sources]),
            text_field=self.text_field if self.kind == "jsonl" else None,
        )

    def documents(self) -> Iterator[Document]:
        """Every document, in order.

        Raises:
            InvalidInput: a file is not what its name says; the message names file and line.
        """
        for index, path in enumerate(self.files):
            try:
                self.check_unchanged(index)
                if self.kind == "text":
                    yield Document(index, 0, path.read_bytes().decode("utf-8"))
                else:
                    yield from self._rows(index, path)
                self.check_unchanged(index)
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
            except (OSError, EOFError, zlib.error) as error:
                raise InvalidInput(f"{path}: cannot be read: {error}") from None

    def check_unchanged(self, index: int) -> None:
        """Check that a file is still what was hashed.

        Raises:
            InvalidInput: it has changed.
        """
        path = self.files[index]
        if file_state(path) != self.states[index] and file_sha256([path]) != [self.sources[index].sha256]:
            raise InvalidInput(f"{path}: the file changed since the build began; run the command again")

    def _rows(self, index: int, path: Path) -> Iterator[Document]:
        for row, line in enumerate(_lines(path)):
            if line.strip():
                yield Document(index, row, self._text(line, f"{path}, line {row + 1}"))

    def _text(self, line: bytes, where: str) -> str:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{where}: not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(self.text_field), str):
            names = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise InvalidInput(
                f"{where}: no text in field {self.text_field!r} (there is: {names}); choose with --text-field"
            )
        text = str(value[self.text_field])
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidInput(f"{where}: field {self.text_field!r} holds half of a surrogate pair, which is no text")
        return text


def open_corpus(patterns: tuple[str, ...], text_field: str) -> Corpus:
    """Find and hash the files of a corpus. A pattern is a file or a glob (`**` for any folders below).

    Raises:
        InvalidInput: a pattern matches nothing or a folder, or text and JSONL are mixed.
    """
    if not patterns:
        raise InvalidInput("no corpus; give text or .jsonl files, or globs, with --corpus")
    found: dict[Path, str] = {}
    for pattern in patterns:
        for path, name in _matches(pattern):
            found.setdefault(path, name)
    kinds = {"jsonl" if path.name.endswith(_JSONL) else "text" for path in found}
    if len(kinds) > 1:
        raise InvalidInput(
            "the corpus mixes JSONL with other files; build them as two datasets, or narrow the patterns"
        )
    files = tuple(found)
    try:
        states = tuple(map(file_state, files))
        hashes = file_sha256(list(files))
    except OSError as error:
        raise InvalidInput(f"{error.filename}: cannot be read: {error.strerror}") from None
    sources = tuple(
        Source(name=printable(found[path]), bytes=state.size, sha256=sha)
        for path, state, sha in zip(files, states, hashes, strict=True)
    )
    return Corpus("jsonl" if kinds == {"jsonl"} else "text", text_field, files, sources, states)


def _matches(pattern: str) -> list[tuple[Path, str]]:
    expanded = os.path.expanduser(pattern)
    if "://" in pattern:
        raise InvalidInput(f"{pattern}: a corpus is read from local files; fetch it first")
    if os.path.isdir(expanded):
        raise InvalidInput(f"{pattern}: a folder; give a glob such as '{pattern.rstrip('/')}/**/*.txt'")
    if os.path.isfile(expanded):
        return [(Path(expanded).absolute(), os.path.basename(expanded))]
    files = sorted(Path(name).absolute() for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
    if not files:
        raise InvalidInput(f"{pattern}: no such file, and no file matches it as a glob")
    base = _fixed_part(expanded)
    return [(path, path.relative_to(base).as_posix()) for path in files]


def _fixed_part(pattern: str) -> Path:
    """The folder before the first wildcard of a glob."""
    parts = Path(pattern).absolute().parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, decompressed."""
    if path.suffix == ".zst":
        yield from _split(_unzstd(path))
    else:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from cast("IO[bytes]", file)


def _unzstd(path: Path) -> Iterator[bytes]:
    """A .zst file's content in portions, frame after frame. One that ends within a frame is an error."""
    import zstandard

    frame, begun = None, False
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            begun = True
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from None
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None or not begun:
        raise EOFError("the compressed data ends too soon")


def _split(portions: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for portion in portions:
        *lines, rest = (rest + portion).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")
