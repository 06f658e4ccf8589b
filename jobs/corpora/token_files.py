"""Files of token ids: `.npy`, and raw `.bin`. Read in portions, so that a file of any length is one document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import numpy as np

from actcache.jobs.corpora.document import BadRow, Document
from actcache.jobs.corpora.files import CorpusFile
from actcache.schemas.corpora import TokenDType
from actcache.schemas.errors import InvalidInput

TOKENS_AT_ONCE = 1 << 20


def npy_rows(file: CorpusFile, source: int, eos: int | None) -> Iterator[Document | BadRow]:
    """One dimension: one document, or with `eos` one up to each of these ids. Two dimensions: a document a row.

    Raises:
        InvalidInput: it is no `.npy` file of integers in one or two dimensions.
    """
    with file.open() as opened:
        shape, fortran, dtype = _header(file, opened)
        if dtype.kind not in "iu" or len(shape) not in (1, 2) or (fortran and len(shape) == 2):
            raise InvalidInput(
                f"{file.where}: holds {dtype} of shape {shape}{' by columns' if fortran else ''}; "
                "token ids are integers in one dimension, or a sequence a row in two"
            )
        if len(shape) == 1:
            yield from _stream(file, source, _portions(file, opened, dtype, shape[0]), eos)
            return
        width = shape[1]
        for row in range(shape[0]):
            ids = np.concatenate([*_portions(file, opened, dtype, width), np.empty(0, dtype)])
            yield Document(source, row, ids) if width else _empty(file, source, row)


def bin_rows(file: CorpusFile, source: int, dtype: TokenDType, eos: int | None) -> Iterator[Document | BadRow]:
    """A little-endian stream of ids without a header: one document, or with `eos` one up to each of these ids.

    Raises:
        InvalidInput: the file is no whole number of ids.
    """
    with file.open() as opened:
        yield from _stream(file, source, _portions(file, opened, np.dtype(dtype).newbyteorder("<"), None), eos)


def _header(file: CorpusFile, opened: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(opened)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(opened)
    except ValueError as error:
        raise InvalidInput(f"{file.where}: not a .npy file: {str(error).splitlines()[0]}") from None
    return shape, fortran, dtype


def _portions(file: CorpusFile, opened: IO[bytes], dtype: np.dtype, length: int | None) -> Iterator[np.ndarray]:
    """The next `length` ids, or all up to the end."""
    left, size = length, dtype.itemsize
    while left is None or left > 0:
        wanted = (TOKENS_AT_ONCE if left is None else min(left, TOKENS_AT_ONCE)) * size
        data = _exactly(opened, wanted)
        if not data and left is None:
            return
        if len(data) % size or (left is not None and len(data) < wanted):
            raise InvalidInput(f"{file.where}: ends within its token ids, or they are not {dtype.name} (--token-dtype)")
        ids = np.frombuffer(data, dtype)
        left = None if left is None else left - len(ids)
        yield ids


def _exactly(opened: IO[bytes], size: int) -> bytes:
    """So many bytes, fewer at the end alone."""
    parts: list[bytes] = []
    while size and (data := opened.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _stream(
    file: CorpusFile, source: int, portions: Iterator[np.ndarray], eos: int | None
) -> Iterator[Document | BadRow]:
    """A stream's documents in pieces. A piece is held back until it is known whether it is a document's last."""
    row, held = 0, None
    for ids in portions:
        cuts = np.flatnonzero(ids == eos) + 1 if eos is not None else np.empty(0, np.int64)
        for piece, ends in _split(ids, cuts):
            if held is not None:
                yield Document(source, row, held, last=False)
            held = piece
            if ends:
                yield Document(source, row, held)
                row, held = row + 1, None
    if held is not None:
        yield Document(source, row, held)
    elif row == 0:
        yield _empty(file, source, 0)


def _split(ids: np.ndarray, cuts: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """The pieces between cuts, and whether a cut follows."""
    low = 0
    for high in cuts.tolist():
        yield ids[low:high], True
        low = high
    if low < len(ids):
        yield ids[low:], False


def _empty(file: CorpusFile, source: int, row: int) -> BadRow:
    return BadRow(source, row, "empty", f"{file.where}, row {row}: no token ids")
