"""Encoding and decoding of shards: Zarr v3's `sharding_indexed` of `bytes → blosc → crc32c`, index at the end.

A shard is its compressed chunks one after the other, then an index of (offset, length) pairs in little-endian uint64, then
the index's crc32c. A chunk is a Blosc buffer and its own crc32c. All of it is written here, since a
shard must be whole before it is put, and equal input must give equal bytes.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import blosc

from actcache.schemas.array import BLOSC_OVERHEAD, CRC_BYTES, INDEX_ENTRY_BYTES, ArrayLayout
from actcache.schemas.errors import Corrupt

ABSENT = (1 << 64) - 1
_CRC = struct.Struct("<I")
_BLOSC_HEADER = struct.Struct("<BBBBIII")

Buffer = bytes | bytearray | memoryview
Piece = tuple[bytes, bytes]
"""A compressed chunk and its crc32c."""


def encode_chunk(layout: ArrayLayout, chunk: np.ndarray) -> Piece:
    """One chunk, compressed, and its crc32c. Call it off the main thread: Blosc then runs on this thread alone."""
    itemsize = layout.numpy_dtype.itemsize
    raw = chunk.view(np.dtype(f"u{itemsize}"))
    packed = blosc.compress(raw, b"zstd", 1, blosc.SHUFFLE, layout.chunk_bytes, itemsize)
    return packed, _CRC.pack(crc32c(packed))


def assemble(layout: ArrayLayout, pieces: Sequence[Piece]) -> memoryview:
    """The bytes of the shard whose first chunks these are."""
    index = np.full((layout.chunks_per_shard, 2), ABSENT, "<u8")
    lengths = np.array([len(packed) + len(crc) for packed, crc in pieces], "<u8")
    index[: len(pieces), 1] = lengths
    index[: len(pieces), 0] = np.cumsum(lengths) - lengths
    tail = index.tobytes()
    parts = [*itertools.chain.from_iterable(pieces), tail, _CRC.pack(crc32c(tail))]
    # numpy copies without the interpreter's lock, so that the forward pass goes on meanwhile
    shard = np.empty(sum(map(len, parts)), np.uint8)
    at = 0
    for part in parts:
        shard[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return shard.data


def decode_index(layout: ArrayLayout, tail: Buffer, where: str) -> np.ndarray:
    """The index that ends a shard: (chunks_per_shard, 2) of offset and length, uint64.

    Raises:
        Corrupt: it is too short or its crc32c does not hold.
    """
    if len(tail) != layout.index_bytes:
        raise Corrupt(f"{where}: the object is shorter than its own index; {ADVICE}")
    body = bytes(tail[:-CRC_BYTES])
    if crc32c(body) != _CRC.unpack(tail[-CRC_BYTES:])[0]:
        raise Corrupt(f"{where}: the index's crc32c does not hold; {ADVICE}")
    return np.frombuffer(body, "<u8").reshape(-1, INDEX_ENTRY_BYTES // 8)


def chunk_span(layout: ArrayLayout, index: np.ndarray, chunk: int, limit: int, where: str) -> tuple[int, int]:
    """Offset and length of a chunk, checked to lie within `limit` bytes and to be no longer than a chunk can be.

    Raises:
        Corrupt: the chunk is absent or out of bounds.
    """
    offset, length = int(index[chunk, 0]), int(index[chunk, 1])
    longest = layout.chunk_bytes + BLOSC_OVERHEAD + CRC_BYTES
    if offset == ABSENT or not CRC_BYTES < length <= longest or offset + length > limit:
        raise Corrupt(f"{where}: chunk {chunk} is absent or out of bounds; {ADVICE}")
    return offset, length


def decode_chunk(layout: ArrayLayout, data: Buffer, out: np.ndarray, where: str) -> None:
    """Decode a chunk's bytes into `out`, the chunk's first len(out) rows, contiguous.

    Raises:
        Corrupt: its crc32c does not hold, or it does not decode to a chunk of this array.
    """
    view = memoryview(data)
    packed = view[:-CRC_BYTES]
    if crc32c(packed) != _CRC.unpack(view[-CRC_BYTES:])[0]:
        raise Corrupt(f"{where}: a chunk's crc32c does not hold; {ADVICE}")
    if len(packed) < _BLOSC_HEADER.size:
        raise Corrupt(f"{where}: a chunk is too short; {ADVICE}")
    _, _, _, _, decoded, _, encoded = _BLOSC_HEADER.unpack(packed[: _BLOSC_HEADER.size])
    if decoded != layout.chunk_bytes or encoded != len(packed):
        raise Corrupt(f"{where}: a chunk decodes to {decoded:,} bytes, not {layout.chunk_bytes:,}; {ADVICE}")
    if len(out) == layout.chunk_rows:
        _decompress(packed, out, where)
    else:
        whole = np.empty((layout.chunk_rows, *layout.row_shape), layout.numpy_dtype)
        _decompress(packed, whole, where)
        out[...] = whole[: len(out)]


def decode_shard(layout: ArrayLayout, shard: Buffer, rows: int, where: str) -> np.ndarray:
    """The first `rows` rows of a whole shard, shape (rows, *row_shape), in the stored dtype.

    Raises:
        Corrupt: any part of it is not as written.
    """
    view = memoryview(shard)
    index = decode_index(layout, view[-layout.index_bytes :], where)
    firsts = range(0, rows, layout.chunk_rows)
    spans = [chunk_span(layout, index, chunk, len(view), where) for chunk in range(len(firsts))]
    out = np.empty((rows, *layout.row_shape), layout.numpy_dtype)
    for first, (offset, length) in zip(firsts, spans, strict=True):
        decode_chunk(layout, view[offset : offset + length], out[first : first + layout.chunk_rows], where)
    return out


ADVICE = "run 'actcache verify --full', then copy the object again from where the dataset came"


def _decompress(packed: Any, out: np.ndarray, where: str) -> None:
    try:
        blosc.decompress(packed, out.view(np.dtype(f"u{out.dtype.itemsize}")))
    except (RuntimeError, ValueError) as error:
        raise Corrupt(f"{where}: a chunk does not decompress ({error}); {ADVICE}") from None
