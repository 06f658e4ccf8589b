"""Quantising, measuring its damage and encoding, against measuring and encoding the exact rows, on the same threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from actcache.cache.encoder import ShardEncoder, encode_shard
from actcache.cache.statistics import measure
from actcache.jobs.quantised import quantise_portion
from actcache.schemas.array import ArrayLayout
from actcache.schemas.quantised import GROUP, KINDS, Kind, quantised_layouts
from benchmarks.material import THREADS, Material, default_cut, layout
from benchmarks.ratio import Result, alternate, compare, timed

TITLE = "quantise: int8 and fp8 with their damage ÷ the exact rows with their statistics, encoded, values/s"
DTYPES = ("float32", "bfloat16")
ROWS_AT_ONCE = 8192
NONE = np.empty(0, np.int64)


def run(material: Material) -> Iterator[Result]:
    """Compare both kinds, of rows computed in either dtype."""
    width = material.widths[1]
    print(f"  activations of {material.model_name}, six sites side by side: {width} wide; groups of {GROUP}")
    for dtype in DTYPES:
        chunk, shard = default_cut(width, dtype)
        rows = material.activations(width, dtype, shard)
        array = layout(rows, chunk, shard)
        with ThreadPoolExecutor(THREADS) as pool:
            sides: dict[str, Callable[[], object]] = {"exact": _exact(array, rows, pool)}
            sides |= {kind: _quantised(array, rows, kind, pool) for kind in KINDS}
            times = alternate({name: timed(side) for name, side in sides.items()}, material.seconds)
        for kind in KINDS:
            amount = rows.size / 1e6
            yield compare("quantise", f"{kind} of {dtype}", times, kind, "exact", amount=amount, unit="M values/s")


def _portions(rows: np.ndarray) -> Iterator[np.ndarray]:
    for low in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[low : low + ROWS_AT_ONCE]


def _exact(array: ArrayLayout, rows: np.ndarray, pool: ThreadPoolExecutor) -> Callable[[], object]:
    def work() -> None:
        measured = [pool.submit(measure, some) for some in _portions(rows)]
        encode_shard(array, rows, pool)
        for future in measured:
            future.result()

    return work


def _quantised(array: ArrayLayout, rows: np.ndarray, kind: Kind, pool: ThreadPoolExecutor) -> Callable[[], object]:
    def work() -> None:
        codes, scales = (ShardEncoder(part, pool) for part in quantised_layouts(array, kind, GROUP))
        portions = [pool.submit(quantise_portion, some, kind, GROUP, NONE) for some in _portions(rows)]
        for future in portions:
            portion = future.result()
            codes.append(portion.codes)
            scales.append(portion.scales)
        codes.finish()
        scales.finish()

    return work
