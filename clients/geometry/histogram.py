"""Quantiles of magnitudes in one pass: how often each range of float32 numbers occurs, no range known beforehand."""

from __future__ import annotations

import numpy as np

AT_ONCE = 1 << 20
EXPONENT_BITS, MANTISSA_BITS = 8, 23
ROUNDING = 1e-9
LARGEST = float(np.finfo(np.float32).max)


class Magnitudes:
    """A histogram of absolute values whose bins are those numbers that agree in float32's exponent and first bits of the fraction.

    With `bits` bits of the fraction each power of two has 2^bits bins, from the smallest float32 to the largest: a quantile is exact
    but for a relative 2^-bits. Counts are exact, and take 8 · 2^(8 + bits) bytes. Bins of two histograms are the same.

    Attributes:
        counts: values in each bin, (2^(8 + bits),) int64, from 0 up.
    """

    def __init__(self, bits: int = 7) -> None:
        self._shift = MANTISSA_BITS - bits
        self.counts = np.zeros(1 << (EXPONENT_BITS + bits), np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count finite float32 values of any shape and sign."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
        for low in range(0, len(flat), AT_ONCE):
            places = (flat[low : low + AT_ONCE] & np.uint32(0x7FFFFFFF)) >> np.uint32(self._shift)
            self.counts += np.bincount(places, minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The value below which a share of all lies, interpolated within its bin; NaN of none."""
        total = int(self.counts.sum())
        if not total:
            return float("nan")
        cumulated = np.cumsum(self.counts)
        wanted = float(np.clip(share * total, 1, total))
        place = int(np.searchsorted(cumulated, np.ceil(wanted - ROUNDING)))
        inside = (wanted - (cumulated[place] - self.counts[place])) / max(int(self.counts[place]), 1)
        low, high = self._edge(place), self._edge(place + 1)
        return low + (high - low) * float(np.clip(inside, 0, 1))

    def _edge(self, place: int) -> float:
        return min(float(np.array(place << self._shift, np.uint32).view(np.float32)), LARGEST)
