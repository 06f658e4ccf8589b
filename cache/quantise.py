"""Quantising and dequantising: float values as codes and scales, as `actcache.schemas.quantised` declares them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from actcache.cache.rows import Rows
from actcache.schemas.quantised import LARGEST_CODE, Kind

SMALLEST_SCALE = np.float32(2.0**-126)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_VALUE_OF = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)

with np.errstate(invalid="ignore"):
    _UPPER = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    _E4M3_OF = np.clip(_UPPER, -448, 448).astype(_E4M3).view(np.uint8)


def quantise(values: np.ndarray, kind: Kind, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, d), int8 or uint8, and scales (n, ⌈d / group⌉), float32, of values (n, d) of any floating-point dtype.

    A group's scale is its largest magnitude by the largest code, rounded to 8 significant bits; never so small that code · scale
    is imprecise, nor so large that it overflows. So no finite value overflows, and a group of zeros stays zeros.
    """
    rows = np.ascontiguousarray(values, np.float32)
    n, d = rows.shape
    count = -(-d // group)
    scales = _scales(np.maximum.reduceat(np.abs(rows), np.arange(0, d, group), axis=1), LARGEST_CODE[kind])
    if count * group != d:
        rows = np.pad(rows, ((0, 0), (0, count * group - d)))
    grouped = rows.reshape(n, count, group)
    with np.errstate(invalid="ignore"):  # what is not finite stops the build elsewhere, with its place
        steps = grouped / scales[:, :, None]
        np.clip(steps, -LARGEST_CODE[kind], LARGEST_CODE[kind], out=steps)
        codes = np.rint(steps, out=steps).astype(np.int8) if kind == "int8" else _e4m3(steps)
    return np.ascontiguousarray(codes.reshape(n, -1)[:, :d]), scales


def dequantise(codes: np.ndarray, scales: np.ndarray, kind: Kind, group: int) -> np.ndarray:
    """Values (n, d), float32, of codes (n, d) and scales (n, ⌈d / group⌉)."""
    values = codes.astype(np.float32) if kind == "int8" else _VALUE_OF[codes]
    whole = values.shape[1] // group
    inside = values[:, : whole * group].reshape(len(values), whole, group)
    inside *= scales[:, :whole, None]
    values[:, whole * group :] *= scales[:, whole:]
    return values


def _e4m3(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest float8_e4m3fn, of two the even one, of float32 values from -448 to 448.

    By a table of the upper 16 bits, whose last is set if any of the lower 16 is: rounding to odd first and to nearest then is the same
    as rounding to nearest (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums"). A cast takes four times as long.
    """
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    upper |= (bits & np.uint32(0xFFFF)) != 0
    return np.asarray(_E4M3_OF[upper])


def _scales(largest: np.ndarray, code: int) -> np.ndarray:
    rounded = (largest / np.float32(code)).astype(ml_dtypes.bfloat16).astype(np.float32)
    top = np.float32(np.finfo(np.float32).max / code).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.clip(rounded, SMALLEST_SCALE, top.view(np.float32))


class QuantisedReader(Rows):
    """Rows of a quantised site as values."""

    def __init__(self, codes: Rows, scales: Rows, kind: Kind, group: int) -> None:
        self._codes = codes
        self._scales = scales
        self._kind = kind
        self._group = group
        self.shape = codes.shape
        self.dtype = np.dtype(np.float32)

    def read(self, start: int = 0, stop: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """See `Rows`."""
        codes = self._codes.read(start, stop)
        return self._values(codes, self._scales.read(start, stop)).astype(dtype or self.dtype, copy=False)

    def scatter(self, index: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """See `Rows`."""
        out[at] = self._values(self._codes.take(index), self._scales.take(index))

    def _values(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return dequantise(codes, scales, self._kind, self._group)
