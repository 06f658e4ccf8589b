"""One array of a dataset as Zarr v3 metadata: sharded along its first axis, whole along the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actcache.schemas.dtypes import is_float, numpy_dtype
from actcache.schemas.errors import InvalidInput, Unsupported

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]*(/[A-Za-z0-9_][A-Za-z0-9_.:\-]*)*")
MAX_CHUNK_BYTES = 1 << 30
MAX_SHARD_CHUNKS = 1 << 20
MAX_RANK = 4
MAX_SHARDS = 1 << 24
MAX_SHARD_BYTES = 4 << 30
BLOSC_OVERHEAD = 16
INDEX_ENTRY_BYTES = 16
CRC_BYTES = 4


@dataclass(frozen=True)
class ArrayLayout:
    """Where the rows of an array lie.

    A shard is one object of `shard_rows` rows, a chunk the compressed piece of `chunk_rows` rows inside it; both span
    every other axis whole. The last shard is padded with zeros to a whole chunk, and chunks past the end are absent.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard_rows: int
    chunk_rows: int
    dimensions: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or self.chunk_rows < 1 or self.shard_rows % self.chunk_rows:
            raise InvalidInput(
                f"{self.name}: a shard of {self.shard_rows} rows is no whole number of chunks of {self.chunk_rows} rows"
            )

        numpy_dtype(self.dtype)
        for what, size, most in (
            ("bytes in a chunk", self.chunk_bytes, MAX_CHUNK_BYTES),
            ("bytes in a shard", self.shard_rows * self.row_bytes, MAX_SHARD_BYTES),
            ("chunks in a shard", self.chunks_per_shard, MAX_SHARD_CHUNKS),
            ("shards", self.n_shards, MAX_SHARDS),
        ):
            if size > most:
                raise InvalidInput(f"{self.name}: {size:,} {what} are beyond the bound of {most:,}")

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of a stored value."""
        return numpy_dtype(self.dtype)

    @property
    def rows(self) -> int:
        """Length of the first axis."""
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, not compressed."""
        return math.prod(self.row_shape) * self.numpy_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, not compressed."""
        return self.chunk_rows * self.row_bytes

    @property
    def n_shards(self) -> int:
        """Number of objects that hold the array."""
        return -(-self.rows // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        """Number of entries in a shard's index."""
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index, which ends the object: offset and length of each chunk, then a crc32c."""
        return self.chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES

    @property
    def metadata_key(self) -> str:
        """Key of the array's metadata document."""
        return f"{self.name}/zarr.json"

    def shard_key(self, index: int) -> str:
        """Key of a shard's object."""
        return "/".join([self.name, "c", str(index), *("0" for _ in self.row_shape)])

    def shard_keys(self) -> list[str]:
        """Keys of every shard."""
        return [self.shard_key(index) for index in range(self.n_shards)]

    def shard_range(self, index: int) -> tuple[int, int]:
        """First row and end row of a shard."""
        return index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows)

    def document(self) -> dict[str, Any]:
        """The array's Zarr v3 metadata."""
        endian: dict[str, Any] = {"name": "bytes"}
        if self.numpy_dtype.itemsize > 1:
            endian["configuration"] = {"endian": "little"}
        index_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        blosc = {
            "cname": "zstd",
            "clevel": 1,
            "shuffle": "shuffle",
            "typesize": self.numpy_dtype.itemsize,
            "blocksize": self.chunk_bytes,
        }
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.row_shape],
            "codecs": [endian, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
            "index_codecs": [index_endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *self.row_shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0.0 if is_float(self.dtype) else 0,
            "dimension_names": list(self.dimensions),
            "attributes": dict(self.attributes),
            "storage_transformers": [],
        }

    @classmethod
    def parse(cls, name: str, document: Any) -> ArrayLayout:
        """Read an array's metadata, which may be a stranger's.

        Raises:
            Unsupported: it is not an array as format 1 writes them, or one of its sizes is beyond all bounds.
        """
        check_name(name)
        try:
            (sharding,) = document["codecs"]
            inner = sharding["configuration"]
            shape = tuple(document["shape"])
            shard = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
            chunk = tuple(inner["chunk_shape"])
            codecs = [codec["name"] for codec in inner["codecs"]]
            index_codecs = [codec["name"] for codec in inner["index_codecs"]]
            endians = [
                codec.get("configuration", {}).get("endian", "little")
                for codec in (inner["codecs"][0], inner["index_codecs"][0])
            ]
            names = {
                "node type": (document["node_type"], "array"),
                "Zarr format": (document["zarr_format"], 3),
                "chunk grid": (document["chunk_grid"]["name"], "regular"),
                "key encoding": (document["chunk_key_encoding"]["name"], "default"),
                "separator": (document["chunk_key_encoding"].get("configuration", {}).get("separator", "/"), "/"),
                "codec": (sharding["name"], "sharding_indexed"),
                "chunk codecs": (codecs, ["bytes", "blosc", "crc32c"]),
                "index codecs": (index_codecs, ["bytes", "crc32c"]),
                "byte order": (endians, ["little", "little"]),
                "index location": (inner.get("index_location", "end"), "end"),
                "storage transformers": (document.get("storage_transformers") or [], []),
            }
            dtype, dimensions = document["data_type"], tuple(document.get("dimension_names") or ())
            attributes = dict(document.get("attributes") or {})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise Unsupported(f"{name}/zarr.json: not an array of format 1 ({type(error).__name__}: {error})") from None
        for what, (found, expected) in names.items():
            if found != expected:
                raise Unsupported(f"{name}/zarr.json: {what} is {found!r}, format 1 has {expected!r}")
        sizes = (*shape, *shard, *chunk)
        if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) or 0 in (*shard, *chunk):
            raise Unsupported(f"{name}/zarr.json: a size is not a whole positive number")
        if not 1 <= len(shape) <= MAX_RANK or not len(shape) == len(shard) == len(chunk):
            raise Unsupported(f"{name}/zarr.json: rank {len(shape)} is not between 1 and {MAX_RANK}, or differs")
        if len(dimensions) != len(shape) or not all(isinstance(name, str) for name in dimensions):
            raise Unsupported(f"{name}/zarr.json: dimension_names are not one text an axis")
        if not shape[1:] == shard[1:] == chunk[1:]:
            raise Unsupported(f"{name}/zarr.json: format 1 cuts arrays along the first axis alone")
        try:
            return cls(name, shape, dtype, shard[0], chunk[0], dimensions, attributes)
        except InvalidInput as error:
            raise Unsupported(f"{name}/zarr.json: {error}") from None


def check_name(name: str) -> None:
    """Refuse an array name that could point outside the dataset.

    Raises:
        Unsupported: the name is empty, absolute, a URL, or holds `..` or an odd character.
    """
    if not _NAME.fullmatch(name) or len(name) > 512 or ".." in name:
        raise Unsupported(f"array name {name!r} is not allowed")


def piece(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most`."""
    return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)


def group_document(attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The Zarr v3 metadata of a group below the root."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}


def head_group(operations: Sequence[Mapping[str, str | float]]) -> dict[str, Any]:
    """The metadata of the head's group, which declares what to do with its arrays."""
    return group_document({"operations": [dict(operation) for operation in operations]})
