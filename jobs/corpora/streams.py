"""Streams of bytes: decompressed, and made of portions."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from actcache.jobs.corpora.files import CorpusFile

PORTION = 1 << 20


@contextmanager
def decompressed(file: CorpusFile) -> Iterator[IO[bytes]]:
    """A file's content from the beginning on, unpacked if its name ends in `.gz` or `.zst`."""
    with file.open() as raw:
        if file.source.name.endswith(".gz"):
            with gzip.open(raw, "rb") as unpacked:
                yield cast("IO[bytes]", unpacked)
        elif file.source.name.endswith(".zst"):
            with stream(_unzstd(raw)) as unpacked:
                yield unpacked
        else:
            yield raw


def stream(portions: Iterator[bytes]) -> IO[bytes]:
    """A readable stream of portions, made as they are needed."""
    return cast("IO[bytes]", io.BufferedReader(_Portions(portions), PORTION))


class _Portions(io.RawIOBase):
    def __init__(self, portions: Iterator[bytes]) -> None:
        self._portions = portions
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            portion = next(self._portions, None)
            if portion is None:
                return 0
            self._rest = memoryview(portion)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """A .zst file's content in portions, frame after frame. One that ends within a frame is an error."""
    import zstandard

    frame, begun = None, False
    while data := file.read(PORTION):
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
