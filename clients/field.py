"""One array of a batch: where its rows come from, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actcache.clients.normalise import How, Normaliser
from actcache.clients.sources import Source
from actcache.schemas.errors import InvalidInput

TOKEN = "token"
"""What a batch calls the places of its tokens on the token axis."""
PIECE_BYTES = 256 << 10
"""Rows are converted in pieces that stay in a core's cache."""


@dataclass(frozen=True)
class Field:
    """An array of a batch.

    Attributes:
        name: its name in the batch.
        source: where its rows come from.
        dtype: of the batch.
        normaliser: what is done to rows, float32, or None.
    """

    name: str
    source: Source
    dtype: np.dtype
    normaliser: Normaliser | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.source.shape[1:]

    @property
    def values(self) -> int:
        """Values of one row."""
        return int(np.prod(self.row_shape, dtype=np.int64))

    def gather(self, rows: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
        """Rows `at` (n,) of those read, in the source's dtype, into `out` (n, …). Other threads run meanwhile."""
        if rows.dtype == self.dtype and self.normaliser is None:
            np.take(rows, at, axis=0, out=out, mode="clip")  # any other mode makes a copy first
            return
        step = max(1, PIECE_BYTES // max(1, self.values * rows.dtype.itemsize))
        stored = np.empty((min(step, len(at)), *self.row_shape), rows.dtype)
        for low in range(0, len(at), step):
            piece = out[low : low + step]
            if rows.dtype == self.dtype:
                np.take(rows, at[low : low + step], axis=0, out=piece, mode="clip")
            else:
                np.take(rows, at[low : low + step], axis=0, out=stored[: len(piece)], mode="clip")
                piece[...] = stored[: len(piece)]
            if self.normaliser is not None:
                self.normaliser.apply(piece)


def fields_of(
    sources: Mapping[str, Source],
    columns: Mapping[str, Source],
    dtype: str,
    normalise: How | None,
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> list[Field]:
    """The arrays of a batch, sites first: see `Batches`.

    Raises:
        InvalidInput: they do not go together.
    """
    if not sources:
        raise InvalidInput("batches of no site; name at least one")
    if dtype not in ("float32", "stored"):
        raise InvalidInput(
            f"dtype={dtype!r}: there is 'float32' and 'stored', and of a dataset's sites 'int8' and 'fp8'"
        )
    if normalise is not None and dtype == "stored":
        raise InvalidInput(f"normalise={normalise!r} with dtype='stored': normalised values are float32")
    twice = sorted({*sources, TOKEN} & {*columns} | {TOKEN} & {*sources})
    if twice:
        raise InvalidInput(f"{twice[0]!r} twice in a batch; leave it out of the sites or columns")
    fields = []
    for name, source in sources.items():
        normaliser = None
        if normalise is not None:
            if name not in statistics:
                raise InvalidInput(f"normalise={normalise!r}: {name} has no statistics")
            if any(np.shape(each) != source.shape[1:] for each in statistics[name]):
                raise InvalidInput(f"{name}: its statistics are of another shape than its rows, {source.shape[1:]}")
            normaliser = Normaliser.of(normalise, *statistics[name], name)
        fields.append(Field(name, source, source.dtype if dtype == "stored" else np.dtype(np.float32), normaliser))
    fields += [Field(name, source, source.dtype) for name, source in columns.items()]
    for field in fields:
        if field.source.shape[0] != fields[0].source.shape[0]:
            raise InvalidInput(
                f"{field.name} has {field.source.shape[0]:,} rows and {fields[0].name} {fields[0].source.shape[0]:,}; "
                "batches are of arrays of one token axis"
            )
    return fields
