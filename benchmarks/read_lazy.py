"""Opening a dataset of a billion tokens and 33 sites, and making the graph of one of them: nothing but its root is there."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import dask
import dask.array as da

import actcache
from benchmarks.datasets import large
from benchmarks.material import Material
from benchmarks.ratio import Result, alternate, compare, timed

TITLE = "read_lazy: a billion tokens, 33 sites, bfloat16; milliseconds, but for the last row of each width"
WIDTHS = (768, 4096)
OPEN, GRAPH, RESID, SLICE, SUM, TASKS, ZEROS = (
    "open",
    "ds[site] and its graph",
    "ds.resid and its graph",
    "ds[site][:1000], ready to compute",
    "ds[site].sum()",
    "every task of ds[site]",
    "every task of da.zeros",
)
GOALS = {OPEN: 1000, GRAPH: 300, RESID: 300, SLICE: 300, SUM: 300, TASKS: 300}
"""Milliseconds."""


def run(material: Material) -> Iterator[Result]:
    """Time a dataset as wide as GPT-2, and one as wide as models of that many layers are."""
    for width in WIDTHS:
        yield from _times(material, large(material, width), width)


def _times(material: Material, folder: Path, width: int) -> Iterator[Result]:
    ds = actcache.open(folder)
    site = ds[ds.sites[0]]
    print(
        f"  {width} wide: {site.npartitions:,} objects a site, a root of {(folder / 'zarr.json').stat().st_size:,} bytes"
    )

    def zeros() -> object:
        made: da.Array = da.zeros(site.shape, chunks=site.chunks, dtype=site.dtype)  # type: ignore[no-untyped-call]
        return dict(made.__dask_graph__())

    sides = {
        OPEN: lambda: actcache.open(folder),
        GRAPH: lambda: ds[ds.sites[-1]].__dask_graph__(),
        RESID: lambda: ds.resid.__dask_graph__(),
        SLICE: lambda: dict(dask.optimize(ds[ds.sites[-1]][:1000])[0].__dask_graph__()),  # type: ignore[no-untyped-call]
        SUM: lambda: ds[ds.sites[-1]].sum(),
        TASKS: lambda: dict(ds[ds.sites[-1]].__dask_graph__()),
        ZEROS: zeros,
    }
    times = alternate({name: timed(work) for name, work in sides.items()}, material.seconds)
    for name, goal in GOALS.items():
        low, middle, high = statistics.quantiles([each * 1e3 for each in times[name]], n=4, method="inclusive")
        yield Result("read_lazy", f"{width} wide, {name}, ms", middle, low, high, len(times[name]), goal, "lower")
    yield compare("read_lazy", f"{width} wide, {TASKS} ÷ {ZEROS}, time", times, TASKS, ZEROS, better="lower")
