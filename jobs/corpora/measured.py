"""A corpus that notes how far into it each document lies, so that what was read can be told as a part of the whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import IO, Any

import numpy as np

from actcache.jobs.corpora.columns import arrow_row_count, parquet_row_count
from actcache.jobs.corpora.corpus import Corpus
from actcache.jobs.corpora.document import BadRow, Document
from actcache.jobs.corpora.files import CorpusFile, LocalFile
from actcache.jobs.corpora.hub import HubDataset
from actcache.jobs.selection import rank
from actcache.jobs.spool import Spool
from actcache.schemas.plan import Source

STEP = 1 << 10
SOURCE, ROW, BEFORE, AFTER, SIZE, UNFINISHED = range(6)
"""The columns of what is noted of a row: where it is, how much of the corpus was read before it and with it, the size of its
content in characters or token ids (-1 otherwise), and whether that is only the first piece of it."""


@dataclass(frozen=True)
class MeasuredCorpus(Corpus):
    """The same corpus.

    `ends` has what lies before each source, and the whole: bytes as stored, of a hub dataset rows. `spread` says whether the
    sources come in a random order.

    `noted` gets a row for each row that is read, as far ahead as the reading is. The position is exact to a row where a file's
    content is one document, is lines, or has its rows counted. Of what is compressed it moves with the portions that are unpacked:
    where it moved, all before the row that moved it was read, and hardly anything else.
    """

    ends: tuple[int, ...]
    noted: Spool
    spread: bool

    @classmethod
    def of(cls, corpus: Corpus, noted: Spool, spread: bool = False) -> MeasuredCorpus | None:
        """A corpus measured; None where nobody says how large it is. `noted` is an empty spool of float64, 6 wide.

        With `spread` its sources come in a random order, the same every time: the first of them are like all of them.

        Raises:
            InvalidInput, StoreError: a hub dataset cannot be asked.
        """
        order = range(len(corpus.parts))
        parts = [corpus.parts[index] for index in (sorted(order, key=_rank) if spread else order)]
        sizes = [part.n_rows() if isinstance(part, HubDataset) else part.source.bytes for part in parts]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or not sum(known):
            return None
        same: dict[str, Any] = {field.name: getattr(corpus, field.name) for field in fields(corpus)}
        lines = corpus.kind in ("jsonl", "csv")
        same["parts"] = tuple(_Counted(part) if lines and not isinstance(part, HubDataset) else part for part in parts)
        return cls(**same, ends=(0, *accumulate(known)), noted=noted, spread=spread)

    @property
    def unit(self) -> str:
        """What the corpus is measured in."""
        return "rows" if self.kind == "hub dataset" else "bytes"

    def documents(self, eos: int | None = None) -> Iterator[Document | BadRow]:
        """See `Corpus`."""
        position, whole = 0.0, True
        ids, rows, source = 0, 1, -1
        for item in super().documents(eos):
            if item.source != source:
                source, ids, rows = item.source, 0, self._row_count(item.source)
            content = item.content if isinstance(item, Document) else None
            ids += content.nbytes if isinstance(content, np.ndarray) else 0
            before = max(position, float(self.ends[source]))
            position = max(before, self._position(item, rows, ids))
            last = item.last if isinstance(item, Document) else True
            if whole:
                size = len(content) if isinstance(content, str | np.ndarray) else -1
                self.noted.append(np.array([[source, item.row, before, position, size, not last]]))
            whole = last
            yield item

    def _row_count(self, source: int) -> int:
        """How many rows a source has, where its rows are what tells the position in it."""
        part = self.parts[source]
        if self.kind == "parquet" and not isinstance(part, HubDataset):
            return parquet_row_count(part)
        if self.kind == "saved dataset" and isinstance(part, LocalFile):
            return arrow_row_count(part)
        return self.ends[source + 1] - self.ends[source] if self.kind == "hub dataset" else 1

    def _position(self, item: Document | BadRow, rows: int, ids: int) -> float:
        """How much of the corpus was read with an item, the `ids` bytes of its source being token ids."""
        begin, end = self.ends[item.source : item.source + 2]
        part = self.parts[item.source]
        if isinstance(part, _Counted):
            return begin + part.position
        if self.kind in ("npy", "bin"):
            return min(begin + ids, end)
        return begin + (end - begin) * min(1.0, (item.row + 1) / max(1, rows))


def _rank(source: int) -> int:
    return rank(0, source, 0)


class _Counted:
    """A file whose reader knows how many bytes it gave."""

    def __init__(self, file: CorpusFile) -> None:
        self._file = file
        self._opened: _Counting | None = None

    @property
    def source(self) -> Source:
        return self._file.source

    @property
    def where(self) -> str:
        return self._file.where

    @property
    def position(self) -> int:
        """Bytes given by the reader that was opened last, while it is open."""
        return 0 if self._opened is None else self._opened.tell()

    def read(self) -> bytes:
        return self._file.read()

    def open(self, *, seekable: bool = False) -> IO[bytes]:
        self._opened = _Counting(_Raw(self._file.open(seekable=seekable)), STEP)
        return self._opened

    def check_unchanged(self) -> None:
        self._file.check_unchanged()


class _Counting(io.BufferedReader):
    """Gives little at once, so that a position says what was needed, and not what was read ahead."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read1(min(size, STEP)) if size is not None and size > 0 else super().read(size)


class _Raw(io.RawIOBase):
    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        self._given = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._given

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._opened.read(min(len(buffer), STEP))
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def close(self) -> None:
        self._opened.close()
        super().close()
